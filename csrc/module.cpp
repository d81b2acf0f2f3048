// Python's view of the kernels: addresses and sizes in, nothing out. See kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <string>
#include <vector>

#include "live.h"
#include "nm.h"

namespace nb = nanobind;

namespace {

using tenfold::Conv2d;
using tenfold::Linear;
using tenfold::LiveGradient;
using tenfold::Weight;
using Address = std::uintptr_t;

struct Kernels {
  bool (*conv2d)(const Conv2d&);
  bool (*linear)(const Linear&);
  double (*peak)(bool);
  bool (*live_gradient)(const LiveGradient&);
};
#define TENFOLD_KERNELS(isa)                                          \
  {                                                                   \
    tenfold::isa::nm_conv2d, tenfold::isa::nm_linear, tenfold::isa::peak, \
        tenfold::isa::live_gradient                                   \
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

void conv2d(Address x, Address values, Address index, Address scale, Address bias, Address add,
            Address out, long batch, long channels, long height, long width, long rows,
            long kernel_height, long kernel_width, long stride_y, long stride_x, long padding_y,
            long padding_x, long dilation_y, long dilation_x, long groups, long tile,
            long block,
            long slots, int type, int activation, int threads) {
  const long k = kernel_height * kernel_width * (channels / groups);
  const Conv2d conv{
      weight_of(values, index, scale, bias, rows, k, tile, block, slots, type, activation),
      reinterpret_cast<const float*>(x),
      reinterpret_cast<const float*>(add),
      reinterpret_cast<float*>(out),
      batch,
      channels,
      height,
      width,
      (height + 2 * padding_y - dilation_y * (kernel_height - 1) - 1) / stride_y + 1,
      (width + 2 * padding_x - dilation_x * (kernel_width - 1) - 1) / stride_x + 1,
      kernel_height,
      kernel_width,
      stride_y,
      stride_x,
      padding_y,
      padding_x,
      dilation_y,
      dilation_x,
      groups,
      threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.conv2d(conv);
  }
  if (!done) throw std::bad_alloc();
}

void linear(Address x, Address values, Address index, Address scale, Address bias, Address add,
            Address out, long tokens, long features, long rows, long tile, long block, long slots, int type,
            int activation, int threads) {
  const Linear layer{weight_of(values, index, scale, bias, rows, features, tile, block, slots, type, activation),
                     reinterpret_cast<const float*>(x),
                     reinterpret_cast<const float*>(add),
                     reinterpret_cast<float*>(out),
                     tokens,
                     threads};
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernels.linear(layer);
  }
  if (!done) throw std::bad_alloc();
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

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels of tenfold; take addresses, check nothing.";
  m.def("instruction_sets", instruction_sets);
  m.def("use", use);
  m.def("conv2d", conv2d);
  m.def("linear", linear);
  m.def("live_gradient", live_gradient);
  m.def("peak", [](bool from_cache) { return kernels.peak(from_cache); });
}
