// Python's view of the kernels: addresses and sizes in, nothing out. See kernels/native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <string>
#include <vector>

#include "attention.h"
#include "nm.h"
#include "pooling.h"

namespace nb = nanobind;

namespace {

using tenfold::Attention;
using tenfold::Conv2d;
using tenfold::Linear;
using tenfold::MaxPool2d;
using tenfold::MeanPool;
using tenfold::Weight;
using Address = std::uintptr_t;

struct Kernels {
  bool (*conv2d)(const Conv2d&);
  bool (*linear)(const Linear&);
  bool (*attention)(const Attention&);
  bool (*max_pool2d)(const MaxPool2d&);
  void (*mean_pool)(const MeanPool&);
  double (*peak)(bool);
};
#define TENFOLD_KERNELS(isa)                                                               \
  { tenfold::isa::nm_conv2d,  tenfold::isa::nm_linear, tenfold::isa::attention,             \
    tenfold::isa::max_pool2d, tenfold::isa::mean_pool, tenfold::isa::peak }
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

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels of tenfold; take addresses, check nothing.";
  m.def("instruction_sets", instruction_sets);
  m.def("use", use);
  m.def("conv2d", conv2d);
  m.def("linear", linear);
  m.def("attention", attention);
  m.def("max_pool2d", max_pool2d);
  m.def("mean_pool", mean_pool);
  m.def("peak", [](bool from_cache) { return kernels.peak(from_cache); });
}
