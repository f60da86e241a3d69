// Region sampling on the CPU. One task handles whole rows; sums run in float32 for half precision.
#include "cpu_rows.h"

#include <sstream>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace patchreg {
namespace {

// ---- row plan ----

void check_choice_range(const Tensor& choice, at::IntArrayRef splits) {
  const int64_t* values = pointer<int64_t>(choice);
  const auto [low, high] = std::minmax_element(values, values + choice.numel());
  const int64_t count = static_cast<int64_t>(splits.size());
  if (choice.numel() == 0 || (*low >= 0 && *high < count)) return;
  std::ostringstream list;
  for (const int64_t split : splits) list << (list.tellp() > 0 ? ", " : "") << split;
  TORCH_CHECK_VALUE(false, "choice holds ", *low < 0 ? *low : *high, "; expected indices 0..",
                    count - 1, " into splits (", list.str(),
                    "). Pass the argmax of the router logits.");
}

Tensor region_lengths(const Tensor& choice_in, at::IntArrayRef split_values, int64_t height,
                      int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_choice(choice_in, splits);
  const Tensor choice = choice_in.contiguous();
  check_choice_range(choice, split_values);
  const int64_t batch = choice.size(0), regions = splits.regions();
  Tensor lengths = at::empty({batch}, choice.options());
  const int64_t* chosen = pointer<int64_t>(choice);
  int64_t* length = lengths.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    length[b] = extra;
    for (int64_t i = 0; i < regions; ++i) {
      const int64_t index = b * regions + i;
      length[b] += region_at(grid, splits, static_cast<int32_t>(i), chosen[index]).count();
    }
  }
  return lengths;
}

std::tuple<Tensor, Tensor> region_route(const Tensor& logits_in, at::IntArrayRef split_values,
                                        int64_t height, int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_logits(logits_in, splits);
  const Tensor logits = logits_in.contiguous();
  const int64_t batch = logits.size(0), regions = splits.regions();
  const auto options = logits.options().dtype(at::kLong);
  Tensor choice = at::empty({batch, splits.region_rows, splits.region_columns}, options);
  Tensor lengths = at::empty({batch}, options);
  int64_t* chosen = choice.mutable_data_ptr<int64_t>();
  int64_t* length = lengths.mutable_data_ptr<int64_t>();
  PATCHREG_DISPATCH(logits, "region_route", [&] {
    const scalar_t* scores = pointer<scalar_t>(logits);
    for (int64_t b = 0; b < batch; ++b) {
      length[b] = extra;
      for (int64_t i = 0; i < regions; ++i) {
        const int64_t index = b * regions + i;
        chosen[index] = best_score(scores + index * splits.count, splits.count);
        length[b] += region_at(grid, splits, static_cast<int32_t>(i), chosen[index]).count();
      }
    }
  });
  return {choice, lengths};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> region_plan(const Tensor& choice_in,
                                                       at::IntArrayRef split_values,
                                                       int64_t height, int64_t width,
                                                       int64_t extra, int64_t total,
                                                       bool padded) {
  const Tensor lengths = region_lengths(choice_in, split_values, height, width, extra);
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  const Tensor choice = choice_in.contiguous();
  const int64_t batch = choice.size(0), regions = splits.regions();
  check_rows(total, batch * grid.tokens());
  const int64_t* length = pointer<int64_t>(lengths);
  Tensor starts = at::empty({batch + 1}, choice.options().dtype(at::kInt));
  int32_t* first = starts.mutable_data_ptr<int32_t>();
  std::vector<int64_t> start(batch + 1, 0);
  first[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    start[b + 1] = start[b] + length[b];
    first[b + 1] = static_cast<int32_t>(std::min(start[b + 1], total));
  }
  TORCH_CHECK_VALUE(padded || start[batch] == total, "total is ", total,
                    ", but the choice makes ", start[batch],
                    " rows. Pass total=None or the sum of row_lengths().");

  Tensor rows = at::empty({total, 4}, choice.options());
  Tensor owner = at::empty({batch, grid.tokens()}, choice.options());
  const int64_t* chosen = pointer<int64_t>(choice);
  int64_t* row_out = rows.mutable_data_ptr<int64_t>();
  int64_t* owner_out = owner.mutable_data_ptr<int64_t>();
  at::parallel_for(0, batch, rows_per_task(grid.tokens()), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t row = start[b];
      int64_t* covers = owner_out + b * grid.tokens();
      const auto add = [&](int64_t y, int64_t x, int64_t step) {
        if (row < total) {
          int64_t* place = row_out + 4 * row;
          place[0] = b, place[1] = y, place[2] = x, place[3] = step;
        }
        const Square square = square_at(grid, static_cast<int32_t>(y), static_cast<int32_t>(x),
                                        static_cast<int32_t>(step));
        const int64_t held = std::min(row, total - 1);  // Only less in a padded plan.
        for (int64_t i = 0; i < square.lines; ++i) {
          std::fill_n(covers + square.token + i * width, square.columns, held);
        }
        ++row;
      };
      for (int64_t t = 0; t < extra; ++t) add(-1 - t, 0, 1);
      for (int64_t i = 0; i < regions; ++i) {
        const Region region =
            region_at(grid, splits, static_cast<int32_t>(i), chosen[b * regions + i]);
        for (int64_t line = 0; line < region.lines; ++line) {
          for (int64_t column = 0; column < region.columns; ++column) {
            add(region.y + line * region.step, region.x + column * region.step, region.step);
          }
        }
      }
    }
  });
  for (int64_t row = start[batch]; row < total; ++row) {  // Padding names a token that exists.
    int64_t* place = row_out + 4 * row;
    place[0] = 0, place[1] = 0, place[2] = 0, place[3] = 1;
  }
  return {rows, lengths, owner, starts};
}

// ---- packed rows ----

void region_pool_out(const Tensor& x_in, const Tensor& rows_in, const Tensor& owner, int64_t height,
                     int64_t width, int64_t extra, bool mean, const Tensor& out) {
  const Grid grid = make_grid(height, width, extra);
  check_tokens(x_in, grid);
  check_plan(rows_in, owner, grid, x_in);
  check_out(out, x_in, {rows_in.size(0), x_in.size(2)});
  const Tensor x = x_in.contiguous(), rows = rows_in.contiguous();
  const int64_t batch = x.size(0), channels = x.size(2), count = rows.size(0);
  const int64_t* row = pointer<int64_t>(rows);
  PATCHREG_DISPATCH(x, "region_pool", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(scalar_t));
    const char* memory = reinterpret_cast<const char*>(source);
    const bool streaming = may_stream(out, bytes);
    at::parallel_for(0, count, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      ReadAhead ahead{nullptr, nullptr};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t* r = row + 4 * i;
        TORCH_CHECK_INDEX(row_is_valid(grid, batch, r), "row ", i, " of the plan, (", r[0], ", ",
                          r[1], ", ", r[2], ", ", r[3], "), lies outside the batch");
        const Square square = square_at(grid, static_cast<int32_t>(r[1]),
                                        static_cast<int32_t>(r[2]), static_cast<int32_t>(r[3]));
        if (i == begin) {
          const int64_t lead = (r[0] * grid.tokens() + square.token) * bytes + kLead;
          ahead = {memory + std::min<int64_t>(lead, x.nbytes()), memory + x.nbytes()};
        }
        ahead.advance(square.count() * bytes);
        pool_row(target + i * channels, source + r[0] * grid.tokens() * channels, square, width,
                 channels, mean ? Sum<scalar_t>(1) / square.count() : Sum<scalar_t>(1), streaming);
      }
      if (streaming) finish_stream();
    });
  });
}

Tensor region_pool(const Tensor& x, const Tensor& rows, const Tensor& owner, int64_t height,
                   int64_t width, int64_t extra, bool mean) {
  TORCH_CHECK_VALUE(x.dim() == 3 && rows.dim() == 2, "expected x [B, N, C] and rows [L, 4]");
  Tensor out = at::empty({rows.size(0), x.size(2)}, x.options());
  region_pool_out(x, rows, owner, height, width, extra, mean, out);
  return out;
}

void region_unpool_out(const Tensor& update_in, const Tensor& rows_in, const Tensor& owner_in,
                       const std::optional<Tensor>& reference_in, int64_t height, int64_t width,
                       int64_t extra, bool mean, const Tensor& out) {
  const Grid grid = make_grid(height, width, extra);
  check_plan(rows_in, owner_in, grid, update_in);
  TORCH_CHECK_VALUE(update_in.dim() == 2 && update_in.size(0) == rows_in.size(0),
                    "expected update [", rows_in.size(0), ", C], got ", update_in.sizes());
  const int64_t channels = update_in.size(1), count = rows_in.size(0);
  const std::vector<int64_t> shape{owner_in.size(0), owner_in.size(1), channels};
  check_out(out, update_in, shape);
  if (reference_in.has_value()) check_like(*reference_in, update_in, shape);
  const Tensor update = update_in.contiguous(), rows = rows_in.contiguous();
  const Tensor owner = owner_in.contiguous();
  const std::optional<Tensor> reference = packed(reference_in);
  const int64_t* row = pointer<int64_t>(rows);
  const int64_t* covering = pointer<int64_t>(owner);
  PATCHREG_DISPATCH(update, "region_unpool", [&] {
    const scalar_t* source = pointer<scalar_t>(update);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, owner.numel(), rows_per_task(channels), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = covering[t];
        TORCH_CHECK_INDEX(i >= 0 && i < count, "token ", t, " is covered by row ", i,
                          ", the plan has ", count);
        scalar_t* place = target + t * channels;
        const scalar_t* values = source + i * channels;
        const scalar_t* added = base == nullptr ? nullptr : base + t * channels;
        Sum<scalar_t> scale = 1;
        if (mean) {
          const int64_t* r = row + 4 * i;
          TORCH_CHECK_INDEX(row_is_valid(grid, owner.size(0), r), "row ", i,
                            " of the plan lies outside the batch");
          scale /= square_at(grid, static_cast<int32_t>(r[1]), static_cast<int32_t>(r[2]),
                             static_cast<int32_t>(r[3]))
                       .count();
        }
        if (scale == Sum<scalar_t>(1)) {
          copy_row(place, values, added, channels);
          continue;
        }
        Sum<scalar_t> sum[kChunk];
        for (int64_t from = 0; from < channels; from += kChunk) {
          const int64_t n = std::min(kChunk, channels - from);
          std::fill(sum, sum + n, Sum<scalar_t>(0));
          scaled_sum(sum, values + from, scale, n);
          if (added != nullptr) line_sum(sum, added + from, 1, 0, n);
          scale_into(place + from, sum, Sum<scalar_t>(1), n);
        }
      }
    });
  });
}

Tensor region_unpool(const Tensor& update, const Tensor& rows, const Tensor& owner,
                     const std::optional<Tensor>& reference, int64_t height, int64_t width,
                     int64_t extra, bool mean) {
  TORCH_CHECK_VALUE(update.dim() == 2 && owner.dim() == 2, "expected update [L, C], owner [B, N]");
  Tensor out = at::empty({owner.size(0), owner.size(1), update.size(1)}, update.options());
  region_unpool_out(update, rows, owner, reference, height, width, extra, mean, out);
  return out;
}

// ---- dense rows ----

std::vector<int64_t> gate_shape(int64_t batch, const Splits& splits) {
  return {batch, splits.region_rows, splits.region_columns, splits.count};
}

Tensor region_pool_dense(const Tensor& x_in, const std::optional<Tensor>& gate_in,
                         at::IntArrayRef split_values, int64_t height, int64_t width,
                         int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_tokens(x_in, grid);
  if (gate_in.has_value()) check_like(*gate_in, x_in, gate_shape(x_in.size(0), splits));
  const Tensor x = x_in.contiguous();
  const std::optional<Tensor> gate = packed(gate_in);
  const int64_t batch = x.size(0), channels = x.size(2), rows = splits.rows;
  Tensor out = at::empty({batch, rows, channels}, x.options());
  PATCHREG_DISPATCH(x, "region_pool_dense", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    const scalar_t* gates = pointer<scalar_t>(gate);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch * rows, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / rows;
        const DenseRow row = dense_row_at(grid, splits, static_cast<int32_t>(i % rows));
        Sum<scalar_t> scale = Sum<scalar_t>(1) / row.square.count();
        if (gates != nullptr && row.split >= 0) {
          const int64_t cell = (b * splits.regions() + row.region) * splits.count + row.split;
          scale = static_cast<Sum<scalar_t>>(gates[cell]);
        }
        pool_row(target + i * channels, source + b * grid.tokens() * channels, row.square, width,
                 channels, scale, false);
      }
    });
  });
  return out;
}

Tensor region_unpool_dense(const Tensor& update_in, const std::optional<Tensor>& gate_in,
                           const std::optional<Tensor>& reference_in, at::IntArrayRef split_values,
                           int64_t height, int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  TORCH_CHECK_VALUE(update_in.dim() == 3 && update_in.size(1) == splits.rows,
                    "expected update [B, ", splits.rows, ", C], got ", update_in.sizes());
  const int64_t batch = update_in.size(0), channels = update_in.size(2), tokens = grid.tokens();
  const std::vector<int64_t> shape{batch, tokens, channels};
  if (gate_in.has_value()) check_like(*gate_in, update_in, gate_shape(batch, splits));
  if (reference_in.has_value()) check_like(*reference_in, update_in, shape);
  const Tensor update = update_in.contiguous();
  const std::optional<Tensor> gate = packed(gate_in), reference = packed(reference_in);
  Tensor out = at::empty(shape, update.options());
  PATCHREG_DISPATCH(update, "region_unpool_dense", [&] {
    const scalar_t* source = pointer<scalar_t>(update);
    const scalar_t* gates = pointer<scalar_t>(gate);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch * tokens, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens;
        const int32_t t = static_cast<int32_t>(i % tokens);
        const scalar_t* image = source + b * splits.rows * channels;
        const scalar_t* added = base == nullptr ? nullptr : base + i * channels;
        if (t < grid.extra) {
          copy_row(target + i * channels, image + t * channels, added, channels);
          continue;
        }
        const int32_t y = (t - grid.extra) / grid.width, x = (t - grid.extra) % grid.width;
        const int64_t cell = (b * splits.regions() + splits.region_of(y, x)) * splits.count;
        Sum<scalar_t> sum[kChunk];
        for (int64_t from = 0; from < channels; from += kChunk) {
          const int64_t n = std::min(kChunk, channels - from);
          std::fill(sum, sum + n, Sum<scalar_t>(0));
          for (int32_t k = 0; k < splits.count; ++k) {
            const int32_t step = splits.step[k];
            const Sum<scalar_t> weight =
                gates != nullptr
                    ? static_cast<Sum<scalar_t>>(gates[cell + k])
                    : Sum<scalar_t>(1) /
                          square_at(grid, y / step * step, x / step * step, step).count();
            scaled_sum(sum, image + splits.dense_row(k, y, x) * channels + from, weight, n);
          }
          if (added != nullptr) line_sum(sum, added + from, 1, 0, n);
          scale_into(target + i * channels + from, sum, Sum<scalar_t>(1), n);
        }
      }
    });
  });
  return out;
}

Tensor region_gate_dot(const Tensor& x_in, const Tensor& update_in, at::IntArrayRef split_values,
                       int64_t height, int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_tokens(x_in, grid);
  const int64_t batch = x_in.size(0), channels = x_in.size(2), regions = splits.regions();
  check_like(update_in, x_in, {batch, splits.rows, channels});
  const Tensor x = x_in.contiguous(), update = update_in.contiguous();
  Tensor out = at::empty(gate_shape(batch, splits), x.options());
  PATCHREG_DISPATCH(x, "region_gate_dot", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    const scalar_t* values = pointer<scalar_t>(update);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    const int64_t grain = rows_per_task(channels * splits.region * splits.region);
    at::parallel_for(0, batch * regions, grain, [&](int64_t begin, int64_t end) {
      Sum<scalar_t> sum[kChunk];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / regions;
        const scalar_t* image = source + b * grid.tokens() * channels;
        for (int32_t k = 0; k < splits.count; ++k) {
          const Region region = region_at(grid, splits, static_cast<int32_t>(i % regions), k);
          Sum<scalar_t> total = 0;
          for (int32_t line = 0; line < region.lines; ++line) {
            for (int32_t column = 0; column < region.columns; ++column) {
              const int32_t cell_y = region.y + line * region.step;
              const int32_t cell_x = region.x + column * region.step;
              const Square square = square_at(grid, cell_y, cell_x, region.step);
              const int64_t row = b * splits.rows + splits.dense_row(k, cell_y, cell_x);
              for (int64_t from = 0; from < channels; from += kChunk) {
                const int64_t n = std::min(kChunk, channels - from);
                square_sum(sum, image, square, width, channels, from, n);
                total += dot_of(sum, values + row * channels + from, n);
              }
            }
          }
          target[i * splits.count + k] = static_cast<scalar_t>(total);
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(patchreg, CPU, m) {
  m.impl("region_lengths", &region_lengths);
  m.impl("region_route", &region_route);
  m.impl("region_plan", &region_plan);
  m.impl("region_pool", &region_pool);
  m.impl("region_pool_out", &region_pool_out);
  m.impl("region_unpool", &region_unpool);
  m.impl("region_unpool_out", &region_unpool_out);
  m.impl("region_pool_dense", &region_pool_dense);
  m.impl("region_unpool_dense", &region_unpool_dense);
  m.impl("region_gate_dot", &region_gate_dot);
}

}  // namespace patchreg
