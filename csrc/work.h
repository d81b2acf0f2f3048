// How a problem is cut into pieces of work, and the memory that a piece needs.
#pragma once

#include <cstdlib>

#include "micro.h"

namespace tenfold::TENFOLD_ISA {

constexpr long kPanelFloats = 8192;  // 32 KiB, the first-level cache of most processors
constexpr long kTileRows = 512;      // sums of as many rows and a panel stay in the second level

// Memory of one thread, grown when needed and kept.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* get(long floats) {
    if (floats > size_) {
      std::free(memory_);
      const auto bytes = static_cast<std::size_t>(ceil_div(floats, 16) * 64);
      memory_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      size_ = memory_ ? floats : 0;
      if (memory_) std::memset(memory_, 0, bytes);
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  long size_ = 0;
};
// How the columns and rows are cut into pieces of work.
struct Cut {
  long columns;  // of an image, or in all
  long images;   // each with its own panels; 1 where panels span images
  long groups;
  long panels;   // an image; the last one has what is left
  long width;    // columns of the others
  long chunks, rows_a_chunk;

  Cut(const Weight& weight, long columns, long images, long groups, int threads, bool tiled)
      : columns(columns), images(images), groups(groups) {
    // A block and its panel fill the cache. The last panel may be half a vector wider.
    const long unit = kHalves ? kLanes / 2 : kLanes, step = kHalves ? 2 : 1;
    const long fitting = kPanelFloats / weight.block / kLanes;
    const long most = step * (fitting < 1 ? 1 : smaller<long>(fitting, kMaxVectors));
    const long units = ceil_div(columns, unit), extra = step - 1;
    panels = units > extra ? ceil_div(units - extra, most) : 1;
    long units_a_panel = units / panels / step * step;
    if (units - (panels - 1) * units_a_panel > most + extra) units_a_panel += step;
    if (panels == 1) units_a_panel = units;
    width = units_a_panel * unit;

    const long rows = weight.rows / groups;
    chunks = tiled ? ceil_div(rows, kTileRows) : 1;
    const long pieces = panels * images * groups;
    if (threads > 1 && pieces < 8L * threads)  // few panels: cut the rows so that all have work
      chunks = ceil_div(chunks, threads) * threads;
    rows_a_chunk = ceil_div(ceil_div(rows, chunks), 8) * 8;
    chunks = ceil_div(rows, rows_a_chunk);
  }
  long pieces() const { return panels * images * groups * chunks; }
  long first_column(long panel) const { return panel * width; }
  int panel_columns(long panel) const {
    return static_cast<int>(panel + 1 < panels ? width : columns - panel * width);
  }
};

}  // namespace tenfold::TENFOLD_ISA
