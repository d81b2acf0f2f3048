// Packing panels: rows are weights' places k, columns are output pixels or tokens.
#pragma once

#include "micro.h"

namespace tenfold::TENFOLD_ISA {

constexpr long kAhead = 8;  // rows of the image to fetch ahead

// A run of columns of a panel that lie side by side in one row of one output image.
struct Run {
  int column, length;
  long image, y, x;
};

struct Runs {
  Run run[kMaxWidth];
  int count = 0;

  Runs(long first, int columns, long out_height, long out_width) {
    long image = first / (out_height * out_width);
    long y = first / out_width % out_height, x = first % out_width;
    for (int column = 0; column < columns;) {
      const int length = static_cast<int>(smaller<long>(out_width - x, columns - column));
      run[count++] = {column, length, image, y, x};
      column += length;
      x = 0;
      if (++y == out_height) {
        y = 0;
        ++image;
      }
    }
  }
};

// Lanes of one vector of a packed row that lie side by side in the image, in one row of it.
struct Piece {
  int begin, end;
  Lanes lanes;
  long source;  // of lane 0, from the channel's plane; the lane itself may lie outside
  bool last;    // piece of its vector; lanes in no piece are padding
};
constexpr long kPieceFloats = sizeof(Piece) / sizeof(float);

// The pieces of a panel's row for each kernel position, ascending.
struct Pieces {
  Piece* piece;
  bool copies;  // the panel is a part of the image as it is
  int columns;
  long* first;  // number of the first piece of each position, and at last of all

  static long floats(const Conv2d& conv) {
    const long positions = conv.kernel_height * conv.kernel_width;
    return positions * 2 * kMaxWidth * kPieceFloats + 2 * (positions + 1);
  }

  Pieces(const Conv2d& conv, const Runs& runs, float* memory)
      : piece(reinterpret_cast<Piece*>(memory)),
        first(reinterpret_cast<long*>(piece + conv.kernel_height * conv.kernel_width * 2 *
                                                  kMaxWidth)) {
    const Run& last = runs.run[runs.count - 1];
    copies = runs.count == 1 && conv.kernel_height * conv.kernel_width == 1 &&
             conv.padding_y == 0 && conv.padding_x == 0 && conv.stride_x == 1;
    columns = last.column + last.length;
    Piece* next = piece;
    const long positions = conv.kernel_height * conv.kernel_width;
    for (long position = 0; position < positions; ++position) {
      first[position] = next - piece;
      const long dy = position / conv.kernel_width * conv.dilation_y - conv.padding_y;
      const long dx = position % conv.kernel_width * conv.dilation_x - conv.padding_x;
      for (int i = 0; i < runs.count; ++i) next = add(conv, runs.run[i], dy, dx, next);
      next[-1].last = true;
    }
    first[positions] = next - piece;
  }

 private:
  static Piece* add(const Conv2d& conv, const Run& run, long dy, long dx, Piece* next) {
    const long y = run.y * conv.stride_y + dy;
    for (int column = run.column; column < run.column + run.length;) {
      const int lane = column % kLanes;
      const int count = smaller(kLanes - lane, run.column + run.length - column);
      // x + i * stride must lie in [0, width).
      const long x = (run.x + column - run.column) * conv.stride_x + dx;
      long begin = x < 0 ? ceil_div(-x, conv.stride_x) : 0;
      long end =
          smaller<long>(conv.width > x ? ceil_div(conv.width - x, conv.stride_x) : 0, count);
      if (y < 0 || y >= conv.height || begin >= end) begin = end = 0;
      const long source = (run.image * conv.channels * conv.height + y) * conv.width + x;
      const int from = lane + static_cast<int>(begin), to = lane + static_cast<int>(end);
      column += count;
      *next++ = {from, to, lanes_between(from, to), begin < end ? source - lane * conv.stride_x : 0,
                 column % kLanes == 0};
    }
    return next;
  }
};

// One vector of `rows` packed rows, from its `count` pieces; the masks stay in registers.
template <int count, class Load>
TENFOLD_INLINE void pack_vector(const Piece* piece, const float* from, long plane, long rows,
                                float* to, int width, const Load& load) {
  Piece at[count];
  for (int i = 0; i < count; ++i) at[i] = piece[i];
  for (long row = 0; row < rows; ++row, from += plane, to += width) {
    // The rows are pages apart, which hides them from the processor's own prefetching.
    __builtin_prefetch(from + at[0].source + kAhead * plane);
    auto value = load(from, at[0]);
    for (int i = 1; i < count; ++i) value = merge(value, load(from, at[i]));
    Simd<kLanes>::store(to, value);  // what is too much, the next row overwrites
  }
}

template <class Load>
void pack_pieces(const Piece* piece, long count, const float* from, long plane, long rows,
                 float* to, int width, const Load& load) {
  switch (count) {
    case 1:
      return pack_vector<1>(piece, from, plane, rows, to, width, load);
    case 2:
      return pack_vector<2>(piece, from, plane, rows, to, width, load);
    case 3:
      return pack_vector<3>(piece, from, plane, rows, to, width, load);
    default:
      for (long row = 0; row < rows; ++row, from += plane, to += width) {
        auto value = load(from, piece[0]);
        for (long i = 1; i < count; ++i) value = merge(value, load(from, piece[i]));
        Simd<kLanes>::store(to, value);
      }
  }
}

template <class Load>
void pack_vectors(const Piece* piece, const Piece* end, const float* from, long plane, long rows,
                  float* to, int width, const Load& load) {
  // Half a vector at the end of a row spills into the next row: it comes first, so that the start
  // of that row is written after it.
  const Piece* last = end - 1;
  while (last != piece && !last[-1].last) --last;
  const int offset = (width - 1) / kLanes * kLanes;
  pack_pieces(last, end - last, from, plane, rows, to + offset, width, load);
  for (; piece != last; to += kLanes) {
    long count = 1;
    while (!piece[count - 1].last) ++count;
    pack_pieces(piece, count, from, plane, rows, to, width, load);
    piece += count;
  }
}

// Packed rows that lie side by side in the image as they do in the panel: `full` vectors and a rest.
template <int full>
void copy_rows(const float* from, long plane, long rows, float* to, int width, Lanes rest) {
  using S = Simd<kLanes>;
  for (long row = 0; row < rows; ++row, from += plane, to += width) {
    for (int v = 0; v < full; ++v) {
      __builtin_prefetch(from + kAhead * plane + v * kLanes);
      S::store(to + v * kLanes, S::load(from + v * kLanes));
    }
    S::store(to + full * kLanes, load_lanes(from + full * kLanes, rest));
  }
}

inline void copy_rows(const float* from, long plane, long rows, float* to, int width, int columns) {
  const int full = (columns - 1) / kLanes;
  const Lanes rest = lanes_between(0, columns - full * kLanes);
  switch (full) {
    case 0: return copy_rows<0>(from, plane, rows, to, width, rest);
    case 1: return copy_rows<1>(from, plane, rows, to, width, rest);
    case 2: return copy_rows<2>(from, plane, rows, to, width, rest);
    case 3: return copy_rows<3>(from, plane, rows, to, width, rest);
    case 4: return copy_rows<4>(from, plane, rows, to, width, rest);
    case 5: return copy_rows<5>(from, plane, rows, to, width, rest);
    case 6: return copy_rows<6>(from, plane, rows, to, width, rest);
    case 7: return copy_rows<7>(from, plane, rows, to, width, rest);
    default: return copy_rows<8>(from, plane, rows, to, width, rest);
  }
}

// im2col of rows [k0, k1) of one group.
inline void pack_conv2d(const Conv2d& conv, const Pieces& pieces, long group, long k0, long k1,
                        int width, float* panel) {
  const long positions = conv.kernel_height * conv.kernel_width, plane = conv.height * conv.width;
  const long channels = conv.channels / conv.groups, tile = conv.weight.tile;
  const float* x = conv.x + group * channels * plane;
  const long stride = conv.stride_x;
  for (long k = k0; k < k1;) {
    const long start = k / (tile * positions) * tile;
    const long tall = smaller(tile, channels - start), rest = k - start * positions;
    const long position = rest / tall, channel = start + rest % tall;
    const long rows = smaller(start + tall - channel, k1 - k);
    const Piece* piece = pieces.piece + pieces.first[position];
    const Piece* end = pieces.piece + pieces.first[position + 1];
    const float* from = x + channel * plane;
    float* to = panel + (k - k0) * width;
    if (pieces.copies) {
      copy_rows(from + piece->source, plane, rows, to, width, pieces.columns);
    } else if (stride == 1) {
      pack_vectors(piece, end, from, plane, rows, to, width,
                   [](const float* at, const Piece& p) { return load_lanes(at + p.source, p.lanes); });
    } else if (stride == 2) {
      pack_vectors(piece, end, from, plane, rows, to, width,
                   [](const float* at, const Piece& p) { return load_even(at + p.source, p.lanes); });
    } else {
      pack_vectors(piece, end, from, plane, rows, to, width, [=](const float* at, const Piece& p) {
        Simd<kLanes>::Float value{};
        for (int lane = p.begin; lane < p.end; ++lane) value[lane] = at[p.source + lane * stride];
        return value;
      });
    }
    k += rows;
  }
}

// The panel's rows are features, its columns tokens: the transposed input.
inline void pack_linear(const Linear& linear, long token, int columns, long k0, long k1,
                        int width, float* panel) {
  const long features = linear.weight.k;
  const float* x = linear.x + token * features;
  int column = 0;
  for (; column + 8 <= columns; column += 8) {
    long k = k0;
    for (; k + 8 <= k1; k += 8)
      transpose8(x + column * features + k, features, panel + (k - k0) * width + column, width);
    for (; k < k1; ++k)
      for (int i = 0; i < 8; ++i)
        panel[(k - k0) * width + column + i] = x[(column + i) * features + k];
  }
  for (; column < columns; ++column)
    for (long k = k0; k < k1; ++k) panel[(k - k0) * width + column] = x[column * features + k];
}

}  // namespace tenfold::TENFOLD_ISA
