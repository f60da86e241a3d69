// Geometry shared by the CPU and the CUDA kernels: squares of the grid, dense and packed rows.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#if defined(__CUDACC__)
#define PATCHREG_HD __host__ __device__ __forceinline__
#else
#define PATCHREG_HD inline
#endif

namespace patchreg {

constexpr int kMaxSplits = 32;

PATCHREG_HD int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
PATCHREG_HD int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// Token grid behind `extra` tokens. Offsets inside one image fit 32 bits (checked by make_grid).
struct Grid {
  int32_t height, width, extra;

  PATCHREG_HD int32_t tokens() const { return extra + height * width; }
};

// Real tokens of a row: `lines` x `columns` from `token` on; extra tokens are squares of one.
struct Square {
  int32_t token, lines, columns;

  PATCHREG_HD int32_t count() const { return lines * columns; }
};

PATCHREG_HD Square square_at(const Grid& grid, int32_t y, int32_t x, int32_t step) {
  if (y < 0) return {-1 - y, 1, 1};
  return {grid.extra + y * grid.width + x, smaller(step, grid.height - y),
          smaller(step, grid.width - x)};
}

// A packed row (b, y, x, step) read from memory is only trusted after this.
PATCHREG_HD bool row_is_valid(const Grid& grid, int64_t batch, const int64_t* row) {
  const int64_t y = row[1], x = row[2];
  const bool image = row[0] >= 0 && row[0] < batch;
  const bool inside = y >= 0 && y < grid.height && x >= 0 && x < grid.width;
  return image && row[3] >= 1 && row[3] <= INT32_MAX && (inside || (y < 0 && -1 - y < grid.extra));
}

// Candidates of a region and their raster maps in the dense variant.
struct Splits {
  int32_t count, region;                  // candidates; region side in tokens
  int32_t region_rows, region_columns;    // regions along the grid
  int32_t rows;                           // dense rows per image
  int32_t step[kMaxSplits];               // side of a square
  int32_t columns[kMaxSplits];            // squares per line of the dense map
  int32_t start[kMaxSplits];              // first dense row of the map

  PATCHREG_HD int32_t regions() const { return region_rows * region_columns; }

  // An invalid index counts as the coarsest square: memory stays safe without a check on the host.
  PATCHREG_HD int32_t chosen_step(int64_t choice) const {
    return choice >= 0 && choice < count ? step[choice] : region;
  }

  PATCHREG_HD int32_t region_of(int32_t y, int32_t x) const {
    return y / region * region_columns + x / region;
  }

  PATCHREG_HD int32_t dense_row(int32_t split, int32_t y, int32_t x) const {
    return start[split] + y / step[split] * columns[split] + x / step[split];
  }
};

// Index of the largest score, the lowest one on ties; NaN counts as largest, as in argmax.
template <typename T>
PATCHREG_HD int32_t best_score(const T* scores, int32_t count) {
  int32_t best = 0;
  for (int32_t k = 1; k < count; ++k) {
    const bool nan = scores[k] != scores[k], best_nan = scores[best] != scores[best];
    if (!best_nan && (nan || scores[k] > scores[best])) best = k;
  }
  return best;
}

// What one row of the dense variant covers; `split` is -1 for extra tokens.
struct DenseRow {
  Square square;
  int32_t split, region;
};

PATCHREG_HD DenseRow dense_row_at(const Grid& grid, const Splits& splits, int32_t row) {
  if (row < grid.extra) return {{row, 1, 1}, -1, 0};
  int32_t split = splits.count - 1;
  while (row < splits.start[split]) --split;
  const int32_t local = row - splits.start[split], step = splits.step[split];
  const int32_t y = local / splits.columns[split] * step, x = local % splits.columns[split] * step;
  return {square_at(grid, y, x, step), split, splits.region_of(y, x)};
}

// One region of the packed layout: its corner, its chosen squares and how many of them are real.
struct Region {
  int32_t y, x, step, lines, columns;

  PATCHREG_HD int32_t count() const { return lines * columns; }
};

PATCHREG_HD Region region_at(const Grid& grid, const Splits& splits, int32_t index,
                             int64_t choice) {
  const int32_t y = index / splits.region_columns * splits.region;
  const int32_t x = index % splits.region_columns * splits.region;
  const int32_t step = splits.chosen_step(choice);
  return {y, x, step, ceil_div(smaller(splits.region, grid.height - y), step),
          ceil_div(smaller(splits.region, grid.width - x), step)};
}

inline Grid make_grid(int64_t height, int64_t width, int64_t extra) {
  TORCH_CHECK_VALUE(height >= 1 && width >= 1 && extra >= 0, "the grid is ", height, "x", width,
                    " with ", extra, " extra tokens; expected at least one token");
  TORCH_CHECK_VALUE(height < INT32_MAX / width && extra < INT32_MAX - height * width,
                    "an image of ", height, "x", width, " tokens is too large");
  return {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(extra)};
}

inline Splits make_splits(at::IntArrayRef values, const Grid& grid) {
  TORCH_CHECK_VALUE(!values.empty() && values.size() <= kMaxSplits, "splits has ", values.size(),
                    " entries; expected 1..", kMaxSplits);
  int64_t region = 0;
  for (const int64_t value : values) region = value > region ? value : region;
  Splits out{};
  out.count = static_cast<int32_t>(values.size());
  TORCH_CHECK_VALUE(region <= 32768, "split ", region, " is too large");
  out.region = static_cast<int32_t>(region);
  out.rows = grid.extra;
  for (int32_t k = 0; k < out.count; ++k) {
    TORCH_CHECK_VALUE(values[k] >= 1 && region % values[k] == 0, "split ", values[k],
                      " does not divide the region side ", region);
    out.step[k] = static_cast<int32_t>(region / values[k]);
    out.columns[k] = ceil_div(grid.width, out.step[k]);
    out.start[k] = out.rows;
    const int64_t rows = static_cast<int64_t>(out.columns[k]) * ceil_div(grid.height, out.step[k]);
    TORCH_CHECK_VALUE(rows < INT32_MAX - out.rows, "the dense variant of this grid is too large");
    out.rows += static_cast<int32_t>(rows);
  }
  out.region_rows = ceil_div(grid.height, out.region);
  out.region_columns = ceil_div(grid.width, out.region);
  return out;
}

// Shape checks of the registered operators: a kernel must not trust its caller with memory.
inline void check_tokens(const at::Tensor& x, const Grid& grid) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == grid.tokens(), "expected tokens [B, ",
                    grid.tokens(), ", C], got ", x.sizes());
}

inline void check_choice(const at::Tensor& choice, const Splits& splits) {
  TORCH_CHECK_TYPE(choice.scalar_type() == at::kLong, "choice is ", choice.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(choice.dim() == 3 && choice.size(1) == splits.region_rows &&
                        choice.size(2) == splits.region_columns,
                    "expected choice [B, ", splits.region_rows, ", ", splits.region_columns,
                    "], got ", choice.sizes());
}

inline void check_logits(const at::Tensor& logits, const Splits& splits) {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) == splits.region_rows &&
                        logits.size(2) == splits.region_columns && logits.size(3) == splits.count,
                    "expected logits [B, ", splits.region_rows, ", ", splits.region_columns, ", ",
                    splits.count, "], got ", logits.sizes());
}

// Row numbers are kept as 32-bit offsets for attention kernels.
inline void check_rows(int64_t total, int64_t tokens) {
  TORCH_CHECK_VALUE(total >= 0, "total is ", total, "; expected the number of rows");
  TORCH_CHECK_VALUE(total == 0 || tokens > 0, "total is ", total,
                    ", but a batch without images makes no rows.");
  TORCH_CHECK_VALUE(total <= INT32_MAX && tokens <= INT32_MAX, "a batch of ", tokens,
                    " tokens is too large for one plan; use smaller batches");
}

inline void check_plan(const at::Tensor& rows, const at::Tensor& owner, const Grid& grid,
                       const at::Tensor& like) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong && owner.scalar_type() == at::kLong,
                   "rows and owner are int64");
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) == 4, "expected rows [L, 4], got ",
                    rows.sizes());
  TORCH_CHECK_VALUE(owner.dim() == 2 && owner.size(1) == grid.tokens(), "expected owner [B, ",
                    grid.tokens(), "], got ", owner.sizes());
  TORCH_CHECK_VALUE(rows.device() == like.device() && owner.device() == like.device(),
                    "the plan is on ", rows.device(), ", the tensor on ", like.device());
}

inline void check_like(const at::Tensor& tensor, const at::Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "expected shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "expected ", like.scalar_type(),
                   ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "expected a tensor on ", like.device(),
                    ", got ", tensor.device());
}

inline void check_out(const at::Tensor& out, const at::Tensor& like, at::IntArrayRef shape) {
  check_like(out, like, shape);
  TORCH_CHECK_VALUE(out.is_contiguous(), "out is not contiguous");
}

}  // namespace patchreg
