// One layer of a generator, on the rows of one thread.
#pragma once

#include "activation.h"
#include "generator_rows.h"
#include "generator_tile.h"

namespace tenfold::TENFOLD_ISA {

constexpr long kBandRows = 8;             // that are measured together, and never cut by threads
constexpr long kManyWeights = 128 * 1024;  // beyond, weights don't stay in the cache for each row
constexpr long kMostRows = 4;             // that are then computed together
constexpr long kPartFloats = 4096;        // rows of some channels, in the first-level cache

// Relative error below 5e-7: the Taylor series where the other form cancels. NaN passes through.
TENFOLD_INLINE Simd<kLanes>::Float hyperbolic_tangent(Simd<kLanes>::Float x) {
  using Float = Simd<kLanes>::Float;
  const Float square = x * x;
  Float series = square * (-1382.0f / 155925) + 62.0f / 2835;
  series = series * square - 17.0f / 315;
  series = series * square + 2.0f / 15;
  series = series * square - 1.0f / 3;
  series = series * square * x + x;
  const Float other = 1.0f - 2.0f / (exponential<kLanes>(x + x) + 1.0f);
  return square < 0.16f ? series : x != x ? x : other;
}

// A layer with the sizes of its maps.
struct SizedLayer : GeneratorLayer {
  long height, width, out_height, out_width;

  bool halved() const { return op == GeneratorOp::down; }
  bool reflects() const { return op == GeneratorOp::convolution || op == GeneratorOp::depthwise; }
  long padding() const { return op == GeneratorOp::up ? 1 : kernel / 2; }
  long stride() const { return halved() ? 2 : 1; }
  // Rows that are stepped over: of the input where the result has two for each.
  long steps() const { return op == GeneratorOp::up ? height : out_height; }
  long steps_a_band() const { return op == GeneratorOp::up ? kBandRows / 2 : kBandRows; }
  long weights() const { return channels * kernel * kernel * outputs; }
  long at_once() const {
    if (op == GeneratorOp::depthwise) return 2;
    return op != GeneratorOp::up && weights() > kManyWeights ? kMostRows : 1;
  }
  // Prepared rows that are needed at once.
  long kept_rows() const {
    return op == GeneratorOp::up ? 2 : (at_once() - 1) * stride() + kernel;
  }
  bool prepared() const { return op != GeneratorOp::pointwise; }
  PreparedRow layout() const { return {width, padding(), halved()}; }
  // Thread-local floats: prepared rows, or the scaled weights and biases of a pointwise layer.
  long ring_floats() const {
    if (prepared()) return kept_rows() * channels * layout().stride;
    return ceil_div(outputs, 8) * 8 * (channels + 1);
  }
};

// A thread's memory.
struct ThreadMemory {
  float* ring;
  float* scale;   // (channels) of the map that is read
  float* shift;
  float* sums;    // see BandSums
  float* image;   // a row of an image, filled up to whole vectors
  float* result;  // kMostRows rows of the result
  double* moments;
};

// Where a layer reads and writes.
struct LayerMaps {
  Map from, to, add, keep;  // without data where there is none
  const float* image;       // for the first layer
  float* result;            // for the last one, (outputs, height, width)
  const double* from_means;
  const double* from_squares;
  double* means;  // `moments` for each band
  double* squares;
  long moments;
};

struct LayerRun {
  const SizedLayer& layer;
  const LayerMaps& maps;
  const float* weights;
  float epsilon;
  const ThreadMemory& memory;
  long begin, end;  // steps of this thread
  long made;        // padded rows below are in the ring or were
  const float* bias;

  LayerRun(const SizedLayer& layer, const LayerMaps& maps, const float* weights, float epsilon,
           const ThreadMemory& memory, long begin, long end)
      : layer(layer), maps(maps), weights(weights), epsilon(epsilon), memory(memory), begin(begin),
        end(end), bias(layer.bias < 0 ? nullptr : weights + layer.bias) {
    made = layer.op == GeneratorOp::up ? begin : begin * layer.stride();
  }

  void run() {
    read_norms();
    switch (layer.op) {
      case GeneratorOp::convolution:
        return layer.kernel == 7 ? with_tile<7, false>() : with_tile<3, false>();
      case GeneratorOp::down:
        return with_tile<3, true>();
      case GeneratorOp::pointwise:
        if (layer.outputs > kSmallGeneratorTile) scale_weights<kGeneratorTile>();
        else scale_weights<kSmallGeneratorTile>();
        return with_tile<1, false>();
      case GeneratorOp::depthwise:
        return depthwise_in_parts();
      case GeneratorOp::up:
        return layer.outputs > kSmallGeneratorTile ? transposed<kGeneratorTile>()
                                                   : transposed<kSmallGeneratorTile>();
    }
  }

 private:
  void read_norms() {
    if (layer.norm == GeneratorNorm::instance)
      norms_of(maps.from_means, maps.from_squares, layer.channels, kBandRows, layer.height,
               layer.width, epsilon, memory.moments, memory.scale, memory.shift);
    if (layer.norm == GeneratorNorm::given) {
      const auto bytes = static_cast<std::size_t>(layer.channels) * sizeof(float);
      std::memcpy(memory.scale, weights + layer.norms, bytes);
      std::memcpy(memory.shift, weights + layer.norms + layer.channels, bytes);
    }
    if (layer.norm == GeneratorNorm::none)
      for (long c = 0; c < layer.channels; ++c) memory.scale[c] = 1, memory.shift[c] = 0;
  }

  // W (scale x + shift) + b = (W scale) x + (W shift + b).
  template <int tile>
  void scale_weights() {
    if (layer.norm == GeneratorNorm::none) return;
    const long padded = ceil_div(layer.outputs, tile) * tile;
    float* biases = memory.ring + padded * layer.channels;
    const float* from = weights + layer.weight;
    float* to = memory.ring;
    for (long o = 0; o < padded; o += tile) {
      typename Simd<tile>::Float sum = Simd<tile>::broadcast(0);
      if (bias) sum = Simd<tile>::load(bias + o);
      for (long c = 0; c < layer.channels; ++c, from += tile, to += tile) {
        const auto w = Simd<tile>::load(from);
        Simd<tile>::store(to, w * memory.scale[c]);
        sum += w * memory.shift[c];
      }
      Simd<tile>::store(biases + o, sum);
    }
    bias = biases;
  }

  const float* weight() const {
    const bool scaled = !layer.prepared() && layer.norm != GeneratorNorm::none;
    return scaled ? memory.ring : weights + layer.weight;
  }

  float* slot(long padded_row) const {
    return memory.ring + padded_row % layer.kept_rows() * layer.channels * layer.layout().stride;
  }

  // Make padded rows up to `last`; row r of the image is padded row r + padding, but for transposed
  // convolutions, where it is row r.
  void prepare(long last) {
    for (; made <= last; ++made) {
      const long y = layer.op == GeneratorOp::up ? made : made - layer.padding();
      const bool outside = y < 0 || y >= layer.height;
      if (outside && !layer.reflects()) {
        const long floats = layer.channels * layer.layout().stride;
        std::memset(slot(made), 0, static_cast<std::size_t>(floats) * sizeof(float));
        continue;
      }
      const bool keep = maps.keep.data && !outside && y >= begin && y < end;
      const long row = reflected(y, layer.height);
      switch (layer.activation) {
        case GeneratorActivation::none:
          make_rows<GeneratorActivation::none>(row, keep, slot(made));
          break;
        case GeneratorActivation::relu:
          make_rows<GeneratorActivation::relu>(row, keep, slot(made));
          break;
        case GeneratorActivation::clamp:
          make_rows<GeneratorActivation::clamp>(row, keep, slot(made));
      }
    }
  }

  template <GeneratorActivation activation>
  void make_rows(long y, bool keep, float* to) const {
    if (maps.add.data) {
      if (keep) rows_of<activation, true, true>(y, to);
      else rows_of<activation, true, false>(y, to);
    } else {
      if (keep) rows_of<activation, false, true>(y, to);
      else rows_of<activation, false, false>(y, to);
    }
  }

  template <GeneratorActivation activation, bool add, bool keep>
  void rows_of(long y, float* to) const {
    const PreparedRow layout = layer.layout();
    const long width = layer.width, padding = layer.padding(), channels = layer.channels;
    const bool halved = layer.halved(), reflects = layer.reflects();
    for (long c = 0; c < channels; ++c, to += layout.stride) {
      Source from{nullptr, memory.scale[c], memory.shift[c], nullptr, nullptr};
      if (maps.image) {  // which ends with its last column
        std::memcpy(memory.image, maps.image + (c * layer.height + y) * width,
                    static_cast<std::size_t>(width) * sizeof(float));
        from.x = memory.image;
      } else {
        from.x = maps.from.row(y) + c * maps.from.stride;
      }
      if constexpr (add) from.add = maps.add.row(y) + c * maps.add.stride;
      if constexpr (keep) from.keep = maps.keep.row(y) + c * maps.keep.stride;
      if (halved) make_halved_row<activation>(from, width, layout.part, to);
      else make_row<activation, add, keep>(from, width, padding, reflects, to);
    }
  }

  // The row that is written: of a map, or one that goes to the result later.
  float* target(long y) const {
    if (!maps.result) return maps.to.row(y);
    return memory.result + y % kMostRows * layer.outputs * map_stride(layer.out_width);
  }
  long target_stride() const { return map_stride(layer.out_width); }

  // Hand on rows that are complete, which lie in one band.
  void finish(long first, long last) const {
    if (maps.result)
      for (long y = first; y < last; ++y) write_result(y);
    if (!layer.measured) return;
    const BandSums sums(memory.sums, layer.outputs);
    sums.add_rows(maps.to, first, last - first, first % kBandRows == 0);
    const long band = first / kBandRows;
    const long rows = smaller(kBandRows, layer.out_height - band * kBandRows);
    if (last == band * kBandRows + rows)
      sums.finish(layer.outputs, rows * layer.out_width, maps.means + band * maps.moments,
                  maps.squares + band * maps.moments);
  }

  void write_result(long y) const {
    using S = Simd<kLanes>;
    float* row = target(y);
    const auto bytes = static_cast<std::size_t>(layer.out_width) * sizeof(float);
    for (long o = 0; o < layer.outputs; ++o, row += target_stride()) {
      for (long i = 0; i < layer.out_width; i += kLanes)
        S::store(row + i, hyperbolic_tangent(S::load(row + i)));
      std::memcpy(maps.result + (o * layer.out_height + y) * layer.out_width, row, bytes);
    }
  }

  template <int K, bool halved>
  void with_tile() {
    const long outputs = layer.outputs;
    // A pointwise layer has few loads of its input: more vectors pay there.
    constexpr int most = K == 1 ? 4 : kMostOutputs;
    if (outputs > kSmallGeneratorTile) return convolve<K, halved, kGeneratorTile, most>();
    // Few outputs are the image's, whose kernel is large.
    if (outputs == 4 || K != 7) return convolve<K, halved, kSmallGeneratorTile, 4>();
    if (outputs > 1) return convolve<K, halved, kSmallGeneratorTile, 3>();
    return convolve<K, halved, kSmallGeneratorTile, 1>();
  }

  template <int K, bool halved, int tile, int R>
  void convolve() {
    const long at_once = layer.at_once(), vectors = ceil_div(layer.out_width, kLanes);
    constexpr int most = most_vectors(R);
    for (long y = begin; y < end; y += at_once) {
      const long count = smaller(at_once, end - y);
      if (K > 1) prepare((y + count - 1) * layer.stride() + K - 1);
      const float* rows[kMostRows][K];
      for (long row = 0; row < count; ++row)
        for (int k = 0; k < K; ++k)
          rows[row][k] = K == 1 ? maps.from.row(y + row)
                                : slot((y + row) * layer.stride() + k) + PreparedRow::lead -
                                      (halved ? 0 : K / 2);
      const auto run = [&](long row, long o, long first, auto n) {
        convolve_piece<K, halved, tile, R>(y + row, rows[row], o, first * kLanes, n);
      };
      if (at_once == 1) {  // a piece of the rows stays in the first-level cache for all outputs
        in_pieces<most>(vectors, [&](long first, auto n) {
          for (long o = 0; o < layer.outputs; o += R) run(0, o, first, n);
        });
      } else {  // weights stay there for all rows
        for (long o = 0; o < layer.outputs; o += R)
          for (long row = 0; row < count; ++row)
            in_pieces<most>(vectors, [&](long first, auto n) { run(row, o, first, n); });
      }
      finish(y, y + count);
    }
  }

  template <int K, bool halved, int tile, int R, class N>
  TENFOLD_INLINE void convolve_piece(long y, const float* const* rows, long o, long at, N) const {
    const PreparedRow layout = layer.layout();
    const TileProblem problem{rows,
                              at,
                              K == 1 ? maps.from.stride : layout.stride,
                              layout.part,
                              layer.channels,
                              K,
                              weight() + o / tile * (layer.channels * K * K * tile) + o % tile,
                              bias ? bias + o : nullptr,
                              target(y) + o * target_stride() + at,
                              target_stride(),
                              layer.outputs - o};
    if constexpr (R == 8) {
      if (problem.outputs <= 4) return convolve_tile<N::value, 4, K, halved, tile>(problem);
    }
    convolve_tile<N::value, R, K, halved, tile>(problem);
  }

  template <int tile>
  void transposed() {
    constexpr int R = kRegisters == 24 ? 4 : 2, most = kRegisters == 24 ? 3 : 2;
    const long stride = layer.layout().stride, vectors = ceil_div(layer.width, kLanes);
    for (long y = begin; y < end; ++y) {
      prepare(y + 1);
      const float* rows[2] = {slot(y) + PreparedRow::lead, slot(y + 1) + PreparedRow::lead};
      in_pieces<most>(vectors, [&](long first, auto n) {
        for (long o = 0; o < layer.outputs; o += R)
          for (int odd = 0; odd < 2; ++odd) {
            const float* from = weights + layer.weight + o / tile * (layer.channels * 9 * tile);
            const TileProblem problem{rows,
                                      first * kLanes,
                                      stride,
                                      0,
                                      layer.channels,
                                      odd + 1,
                                      from + o % tile + odd * 3 * tile,
                                      bias ? bias + o : nullptr,
                                      maps.to.row(2 * y + odd) + o * maps.to.stride +
                                          2 * first * kLanes,
                                      maps.to.stride,
                                      layer.outputs - o};
            transposed_tile<decltype(n)::value, R, tile>(problem);
          }
      });
      finish(2 * y, 2 * y + 2);
    }
  }

  // Channels have nothing to do with each other: some of them go through all rows, and what is made
  // of them stays in the first-level cache.
  void depthwise_in_parts() const {
    const long fitting = kPartFloats / (layer.kept_rows() * layer.layout().stride);
    const long most = fitting < 1 ? 1 : fitting;
    for (long first = 0; first < layer.channels; first += most) {
      SizedLayer part = layer;
      part.channels = part.outputs = smaller(most, layer.channels - first);
      part.weight += first * 9;
      if (part.bias >= 0) part.bias += first;
      LayerMaps some = maps;
      some.from = maps.from.part(first, part.channels);
      some.to = maps.to.part(first, part.channels);
      some.add = maps.add.part(first, part.channels);
      some.keep = maps.keep.part(first, part.channels);
      if (some.image) some.image += first * layer.height * layer.width;
      some.means += first;
      some.squares += first;
      ThreadMemory its = memory;
      its.scale += first;
      its.shift += first;
      LayerRun(part, some, weights, epsilon, its, begin, end).depthwise();
    }
  }

  void depthwise() {
    const long at_once = layer.at_once();
    for (long y = begin; y < end; y += at_once) {
      const long count = smaller(at_once, end - y);
      prepare(y + count + 1);
      if (count == 2) depthwise_rows<2>(y);
      else depthwise_rows<1>(y);
      finish(y, y + count);
    }
  }

  template <int T>
  void depthwise_rows(long y) const {
    const long stride = layer.layout().stride, vectors = ceil_div(layer.width, kLanes);
    const float* rows[T + 2];
    float* results[T];
    for (int k = 0; k < T + 2; ++k) rows[k] = slot(y + k) + PreparedRow::lead - 1;
    for (int t = 0; t < T; ++t) results[t] = target(y + t);
    in_pieces<4>(vectors, [&](long first, auto n) {
      for (long c = 0; c < layer.channels; ++c) {
        const float* from[T + 2];
        float* to[T];
        for (int k = 0; k < T + 2; ++k) from[k] = rows[k] + c * stride + first * kLanes;
        for (int t = 0; t < T; ++t) to[t] = results[t] + c * target_stride() + first * kLanes;
        depthwise_tile<decltype(n)::value, T>(from, weights + layer.weight + c * 9,
                                              bias ? bias[c] : 0.0f, to);
      }
    });
  }
};

}  // namespace tenfold::TENFOLD_ISA
