// Python's view of the kernels: addresses and sizes in, nothing out. See kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <string>
#include <vector>

#include "attention.h"
#include "generator.h"
#include "lab.h"
#include "labnet.h"
#include "labnet_fields.h"
#include "layout.h"
#include "live.h"
#include "memory.h"
#include "nm.h"
#include "normalize.h"
#include "pooling.h"
#include "resize.h"
#include "ssim.h"
#include "winograd.h"

namespace nb = nanobind;

namespace {

using tenfold::Attention;
using tenfold::Conv2d;
using tenfold::Generator;
using tenfold::GeneratorLayer;
using tenfold::LabErrors;
using tenfold::LabOfRgb;
using tenfold::LabnetFields;
using tenfold::LabnetLayer;
using tenfold::LabnetPixels;
using tenfold::LabnetResample;
using tenfold::LabnetVariances;
using tenfold::LayerNorm;
using tenfold::Linear;
using tenfold::LiveGradient;
using tenfold::MaxPool2d;
using tenfold::MeanPool;
using tenfold::RegionSsim;
using tenfold::Resize;
using tenfold::RgbOfLab;
using tenfold::Transpose;
using tenfold::Weight;
using tenfold::Winograd3d;
using Address = std::uintptr_t;

struct Kernels {
  bool (*conv2d)(const Conv2d&);
  bool (*linear)(const Linear&);
  bool (*attention)(const Attention&);
  bool (*max_pool2d)(const MaxPool2d&);
  void (*mean_pool)(const MeanPool&);
  void (*layer_norm)(const LayerNorm&);
  double (*peak)(bool);
  bool (*winograd3d)(const Winograd3d&);
  void (*transpose)(const Transpose&);
  bool (*live_gradient)(const LiveGradient&);
  bool (*generator)(const Generator&);
  void (*lab_of_rgb)(const LabOfRgb&);
  void (*rgb_of_lab)(const RgbOfLab&);
  void (*lab_errors)(const LabErrors&);
  void (*region_ssim)(const RegionSsim&);
  bool (*resize)(const Resize&);
  bool (*labnet_layer)(const LabnetLayer&);
  void (*labnet_variances)(const LabnetVariances&);
  void (*labnet_resample)(const LabnetResample&);
  void (*labnet_pixels)(const LabnetPixels&);
};
#define TENFOLD_KERNELS(isa)                                                            \
  {                                                                                     \
    tenfold::isa::nm_conv2d, tenfold::isa::nm_linear, tenfold::isa::attention,          \
        tenfold::isa::max_pool2d, tenfold::isa::mean_pool, tenfold::isa::layer_norm,    \
        tenfold::isa::peak, tenfold::isa::winograd3d, tenfold::isa::transpose,          \
        tenfold::isa::live_gradient, tenfold::isa::generator, tenfold::isa::lab_of_rgb, \
        tenfold::isa::rgb_of_lab, tenfold::isa::lab_errors, tenfold::isa::region_ssim,  \
        tenfold::isa::resize, tenfold::isa::labnet_layer,                               \
        tenfold::isa::labnet_variances, tenfold::isa::labnet_resample,                  \
        tenfold::isa::labnet_pixels                                                     \
  }
Kernels kernels = TENFOLD_KERNELS(portable);

// Best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(TENFOLD_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    names.emplace_back("avx512");
  if (avx2) names.emplace_back("avx2");
#elif defined(__ARM_NEON)
  names.emplace_back("neon");
#endif
  names.emplace_back("portable");
  return names;
}

void use(const std::string& name) {
#if defined(TENFOLD_X86)
  if (name == "avx512") {
    kernels = TENFOLD_KERNELS(avx512);
    return;
  }
  if (name == "avx2") {
    kernels = TENFOLD_KERNELS(avx2);
    return;
  }
#endif
  // On Arm the portable kernels' vectors are NEON's.
  kernels = TENFOLD_KERNELS(portable);
}

Weight weight_of(Address values, Address index, Address scale, Address bias, long rows, long k, long tile,
                 long block, long slots, int type, int activation) {
  return {reinterpret_cast<const void*>(values),
          reinterpret_cast<const std::uint8_t*>(index),
          reinterpret_cast<const float*>(scale),
          reinterpret_cast<const float*>(bias),
          static_cast<tenfold::WeightType>(type),
          static_cast<tenfold::Activation>(activation),
          rows,
          k,
          tile,
          block,
          slots};
}

// A problem with everything in place but the activations: made once, solved often.
struct PreparedConv2d {
  Conv2d problem;
  bool solve() const { return kernels.conv2d(problem); }
};
struct PreparedLinear {
  Linear problem;
  bool solve() const { return kernels.linear(problem); }
};

template <class Prepared>
void run(Prepared prepared, Address x, Address add, Address out, int threads) {
  prepared.problem.x = reinterpret_cast<const float*>(x);
  prepared.problem.add = reinterpret_cast<const float*>(add);
  prepared.problem.out = reinterpret_cast<float*>(out);
  prepared.problem.threads = threads;
  bool done;
  {
    nb::gil_scoped_release release;
    done = prepared.solve();
  }
  if (!done) throw std::bad_alloc();
}

PreparedConv2d conv2d(Address values, Address index, Address scale, Address bias, long batch,
                      long channels, long height, long width, long rows, long out_height,
                      long out_width, long kernel_height, long kernel_width, long stride_y,
                      long stride_x, long padding_y, long padding_x, long dilation_y,
                      long dilation_x, long groups, long tile, long block, long slots, int type,
                      int activation) {
  const long k = kernel_height * kernel_width * (channels / groups);
  Conv2d problem{};
  problem.weight =
      weight_of(values, index, scale, bias, rows, k, tile, block, slots, type, activation);
  problem.batch = batch;
  problem.channels = channels;
  problem.height = height;
  problem.width = width;
  problem.out_height = out_height;
  problem.out_width = out_width;
  problem.kernel_height = kernel_height;
  problem.kernel_width = kernel_width;
  problem.stride_y = stride_y;
  problem.stride_x = stride_x;
  problem.padding_y = padding_y;
  problem.padding_x = padding_x;
  problem.dilation_y = dilation_y;
  problem.dilation_x = dilation_x;
  problem.groups = groups;
  return {problem};
}

PreparedLinear linear(Address values, Address index, Address scale, Address bias, long tokens,
                      long features, long rows, long tile, long block, long slots, int type,
                      int activation) {
  Linear problem{};
  problem.weight =
      weight_of(values, index, scale, bias, rows, features, tile, block, slots, type, activation);
  problem.tokens = tokens;
  return {problem};
}

using Sizes = std::vector<long>;

// sizes: batch, channels, outputs; then depth, height and width of the input, of the convolution's
// output, the padding, the kinds of axes and the windows of the maximum.
void winograd3d(Address x, Address weight, Address bias, Address add, Address out,
                const std::vector<int>& columns, const Sizes& sizes, float a, float b,
                int activation, int threads) {
  const auto axis = [&](int i) { return static_cast<tenfold::Axis>(sizes.at(12 + i)); };
  const Winograd3d conv{reinterpret_cast<const float*>(x),
                        reinterpret_cast<const float*>(weight),
                        reinterpret_cast<const float*>(bias),
                        reinterpret_cast<const float*>(add),
                        reinterpret_cast<float*>(out),
                        columns.data(),
                        static_cast<long>(columns.size()),
                        sizes.at(0),
                        sizes.at(1),
                        sizes.at(3),
                        sizes.at(4),
                        sizes.at(5),
                        sizes.at(2),
                        sizes.at(6),
                        sizes.at(7),
                        sizes.at(8),
                        {sizes.at(9), sizes.at(10), sizes.at(11)},
                        {axis(0), axis(1), axis(2)},
                        a,
                        b,
                        static_cast<tenfold::Activation>(activation),
                        {sizes.at(15), sizes.at(16), sizes.at(17)},
                        threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.winograd3d(conv);
  }
  if (!done) throw std::bad_alloc();
}

void transpose(Address from, Address to, long batch, long rows, long columns, int threads) {
  const Transpose given{reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to), batch,
                        rows, columns, threads};
  nb::gil_scoped_release release;
  kernels.transpose(given);
}

void large_pages(Address memory, std::size_t bytes) {
  tenfold::advise_large_pages(reinterpret_cast<void*>(memory), bytes);
}

// Strides in floats over batch, heads and tokens.
void attention(Address q, long q_batch, long q_head, long q_token, Address k, long k_batch,
               long k_head, long k_token, Address v, long v_batch, long v_head, long v_token,
               Address out, long batch, long heads, long queries, long keys, long depth,
               float scale, int threads) {
  const Attention problem{{reinterpret_cast<const float*>(q), q_batch, q_head, q_token},
                          {reinterpret_cast<const float*>(k), k_batch, k_head, k_token},
                          {reinterpret_cast<const float*>(v), v_batch, v_head, v_token},
                          reinterpret_cast<float*>(out),
                          batch,
                          heads,
                          queries,
                          keys,
                          depth,
                          scale,
                          threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.attention(problem);
  }
  if (!done) throw std::bad_alloc();
}

void max_pool2d(Address x, Address out, long planes, long height, long width, long out_height,
                long out_width, long kernel_height, long kernel_width, long stride_y,
                long stride_x, long padding_y, long padding_x, long dilation_y, long dilation_x,
                bool relu, int threads) {
  const MaxPool2d pool{reinterpret_cast<const float*>(x),
                       reinterpret_cast<float*>(out),
                       planes,
                       height,
                       width,
                       out_height,
                       out_width,
                       kernel_height,
                       kernel_width,
                       stride_y,
                       stride_x,
                       padding_y,
                       padding_x,
                       dilation_y,
                       dilation_x,
                       relu,
                       threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.max_pool2d(pool);
  }
  if (!done) throw std::bad_alloc();
}

void mean_pool(Address x, Address out, long planes, long pixels, int threads) {
  nb::gil_scoped_release release;
  kernels.mean_pool({reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), planes,
                     pixels, threads});
}

void layer_norm(Address x, Address weight, Address bias, Address out, long rows, long features,
                float epsilon, int threads) {
  nb::gil_scoped_release release;
  kernels.layer_norm({reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight),
                      reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(out), rows,
                      features, epsilon, threads});
}

void live_gradient(Address x, Address gradient, Address live, Address channel, Address row,
                   Address column, Address out, long images, long height, long width, long channels,
                   long out_height, long out_width, long outputs, long weights, long stride_y,
                   long stride_x, long first_row, long rows, long first_column, long columns,
                   int threads) {
  const LiveGradient problem{reinterpret_cast<const float*>(x),
                             reinterpret_cast<const float*>(gradient),
                             reinterpret_cast<const std::uint8_t*>(live),
                             reinterpret_cast<const std::int32_t*>(channel),
                             reinterpret_cast<const std::int32_t*>(row),
                             reinterpret_cast<const std::int32_t*>(column),
                             reinterpret_cast<float*>(out),
                             images,
                             height,
                             width,
                             channels,
                             out_height,
                             out_width,
                             outputs,
                             weights,
                             stride_y,
                             stride_x,
                             first_row,
                             rows,
                             first_column,
                             columns,
                             threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.live_gradient(problem);
  }
  if (!done) throw std::bad_alloc();
}

// A program's fields in the order of GeneratorLayer.
void generator(const Sizes& fields, Address weights, Address x, Address out, long batch,
               long height, long width, float epsilon, int threads) {
  std::vector<GeneratorLayer> layers;
  for (std::size_t i = 0; i + tenfold::kGeneratorFields <= fields.size();
       i += tenfold::kGeneratorFields) {
    const long* f = fields.data() + i;
    layers.push_back({static_cast<tenfold::GeneratorOp>(f[0]), f[1], f[2], f[3], f[4], f[5],
                      static_cast<tenfold::GeneratorNorm>(f[6]),
                      static_cast<tenfold::GeneratorActivation>(f[7]), f[8], f[9], f[10], f[11],
                      f[12], f[13] != 0});
  }
  const Generator problem{layers.data(),
                          static_cast<long>(layers.size()),
                          reinterpret_cast<const float*>(weights),
                          reinterpret_cast<const float*>(x),
                          reinterpret_cast<float*>(out),
                          batch,
                          height,
                          width,
                          epsilon,
                          threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.generator(problem);
  }
  if (!done) throw std::bad_alloc();
}

// RGB is bytes, or floats.
void lab_of_rgb(Address rgb, bool bytes, Address lab, long images, long pixels, bool codes,
                int threads) {
  nb::gil_scoped_release release;
  kernels.lab_of_rgb({bytes ? reinterpret_cast<const std::uint8_t*>(rgb) : nullptr,
                      bytes ? nullptr : reinterpret_cast<const float*>(rgb),
                      reinterpret_cast<float*>(lab), images, pixels, codes, threads});
}

void rgb_of_lab(Address lab, Address rgb, bool bytes, long images, long pixels, bool codes,
                int threads) {
  nb::gil_scoped_release release;
  kernels.rgb_of_lab({reinterpret_cast<const float*>(lab),
                      bytes ? reinterpret_cast<std::uint8_t*>(rgb) : nullptr,
                      bytes ? nullptr : reinterpret_cast<float*>(rgb), images, pixels, codes,
                      threads});
}

void lab_errors(Address a, Address b, Address shadow, Address sums, long images, long pixels,
                int threads) {
  nb::gil_scoped_release release;
  kernels.lab_errors({reinterpret_cast<const std::uint8_t*>(a),
                      reinterpret_cast<const std::uint8_t*>(b),
                      reinterpret_cast<const std::uint8_t*>(shadow),
                      reinterpret_cast<double*>(sums), images, pixels, threads});
}

void region_ssim(Address a, Address b, Address shadow, Address out, long images, long channels,
                 long height, long width, int threads) {
  nb::gil_scoped_release release;
  kernels.region_ssim({reinterpret_cast<const std::uint8_t*>(a),
                       reinterpret_cast<const std::uint8_t*>(b),
                       reinterpret_cast<const std::uint8_t*>(shadow),
                       reinterpret_cast<double*>(out), images, channels, height, width, threads});
}

// sizes: height, width, channels, and height and width of the output; then the taps of x and y.
void resize(Address pixels, Address out, const Sizes& sizes, Address x_first, Address x_weight,
            Address y_first, Address y_weight) {
  const auto axis = [](Address first, Address weight, long taps) {
    return tenfold::ResizeAxis{reinterpret_cast<const std::int32_t*>(first),
                               reinterpret_cast<const std::int32_t*>(weight), taps};
  };
  const Resize problem{reinterpret_cast<const std::uint8_t*>(pixels),
                       reinterpret_cast<std::uint8_t*>(out),
                       sizes.at(0),
                       sizes.at(1),
                       sizes.at(2),
                       sizes.at(3),
                       sizes.at(4),
                       axis(x_first, x_weight, sizes.at(5)),
                       axis(y_first, y_weight, sizes.at(6))};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.resize(problem);
  }
  if (!done) throw std::bad_alloc();
}

void labnet_layer(const Sizes& fields) {
  const LabnetLayer layer = LabnetFields(fields).layer();
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.labnet_layer(layer);
  }
  if (!done) throw std::bad_alloc();
}

void labnet_variances(const Sizes& fields) {
  const LabnetVariances problem = LabnetFields(fields).variances();
  nb::gil_scoped_release release;
  kernels.labnet_variances(problem);
}

void labnet_resample(const Sizes& fields) {
  const LabnetResample problem = LabnetFields(fields).resample();
  nb::gil_scoped_release release;
  kernels.labnet_resample(problem);
}

void labnet_pixels(const Sizes& fields) {
  const LabnetPixels problem = LabnetFields(fields).pixels();
  nb::gil_scoped_release release;
  kernels.labnet_pixels(problem);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels of tenfold; take addresses, check nothing.";
  m.def("instruction_sets", instruction_sets);
  m.def("use", use);
  nb::class_<PreparedConv2d>(m, "PreparedConv2d").def("__call__", run<PreparedConv2d>);
  nb::class_<PreparedLinear>(m, "PreparedLinear").def("__call__", run<PreparedLinear>);
  m.def("conv2d", conv2d);
  m.def("linear", linear);
  m.def("winograd3d", winograd3d);
  m.def("transpose", transpose);
  m.def("large_pages", large_pages);
  m.def("attention", attention);
  m.def("max_pool2d", max_pool2d);
  m.def("mean_pool", mean_pool);
  m.def("layer_norm", layer_norm);
  m.def("live_gradient", live_gradient);
  m.def("generator", generator);
  m.def("labnet_layer", labnet_layer);
  m.def("labnet_variances", labnet_variances);
  m.def("labnet_resample", labnet_resample);
  m.def("labnet_pixels", labnet_pixels);
  m.def("lab_of_rgb", lab_of_rgb);
  m.def("rgb_of_lab", rgb_of_lab);
  m.def("lab_errors", lab_errors);
  m.def("region_ssim", region_ssim);
  m.def("resize", resize);
  m.def("peak", [](bool from_cache) { return kernels.peak(from_cache); });
}
