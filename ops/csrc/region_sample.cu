// Region sampling on CUDA devices. Every output element is gathered by one thread in a fixed order: no
// atomics, no host sync, nothing but launches on the current stream (so graphs may capture it).
#include "cuda_rows.cuh"

#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

namespace patchreg {
namespace {

// ---- row plan: one block per image ----

__global__ void lengths_kernel(const int64_t* choice, Grid grid, Splits splits, int64_t* lengths) {
  __shared__ int64_t shared[kThreads];
  const int64_t image = blockIdx.x;
  const int32_t regions = splits.regions();
  int64_t count = 0;
  for (int32_t i = threadIdx.x; i < regions; i += kThreads) {
    count += region_at(grid, splits, i, choice[image * regions + i]).count();
  }
  count = block_sum(count, shared);
  if (threadIdx.x == 0) lengths[image] = grid.extra + count;
}

__device__ void write_row(int64_t* rows, int64_t row, int64_t total, int64_t image, int64_t y,
                          int64_t x, int64_t step) {
  if (row >= total) return;  // A wrong total must not cost other people's memory.
  rows[4 * row] = image;
  rows[4 * row + 1] = y;
  rows[4 * row + 2] = x;
  rows[4 * row + 3] = step;
}

template <typename T>
__global__ void route_kernel(const T* logits, Grid grid, Splits splits, int64_t* choice,
                             int64_t* lengths) {
  __shared__ int64_t shared[kThreads];
  const int64_t image = blockIdx.x;
  const int32_t regions = splits.regions();
  int64_t count = 0;
  for (int32_t i = threadIdx.x; i < regions; i += kThreads) {
    const int64_t index = image * regions + i;
    const int32_t best = best_score(logits + index * splits.count, splits.count);
    choice[index] = best;
    count += region_at(grid, splits, i, best).count();
  }
  count = block_sum(count, shared);
  if (threadIdx.x == 0) lengths[image] = grid.extra + count;
}

// In a padded plan whose total is too small, tokens of rows that do not exist are given the last one.
__device__ __forceinline__ int64_t held_row(int64_t row, int64_t total, bool padded) {
  return padded && row >= total ? total - 1 : row;
}

__global__ void plan_kernel(const int64_t* choice, const int64_t* lengths, Grid grid, Splits splits,
                            int64_t total, bool padded, int64_t* rows, int64_t* owner,
                            int32_t* image_starts) {
  __shared__ int64_t shared[kThreads];
  __shared__ int64_t starts[kThreads];
  const int64_t image = blockIdx.x;
  const int thread = threadIdx.x;
  const int32_t regions = splits.regions(), side = splits.region;

  int64_t before = 0;
  for (int64_t b = thread; b < image; b += kThreads) before += lengths[b];
  int64_t start = block_sum(before, shared);
  if (image == 0 && thread == 0) image_starts[0] = 0;

  owner += image * grid.tokens();
  choice += image * regions;
  for (int32_t t = thread; t < grid.extra; t += kThreads) {
    owner[t] = held_row(start + t, total, padded);
    write_row(rows, start + t, total, image, -1 - t, 0, 1);
  }
  start += grid.extra;

  for (int32_t first = 0; first < regions; first += kThreads) {
    const int32_t held = smaller(kThreads, regions - first);
    const int64_t mine =
        thread < held ? region_at(grid, splits, first + thread, choice[first + thread]).count() : 0;
    __syncthreads();
    shared[thread] = mine;
    for (int offset = 1; offset < kThreads; offset *= 2) {  // inclusive scan
      __syncthreads();
      const int64_t left = thread >= offset ? shared[thread - offset] : 0;
      __syncthreads();
      shared[thread] += left;
    }
    starts[thread] = start + shared[thread] - mine;
    __syncthreads();
    start += shared[kThreads - 1];

    for (int64_t cell = thread; cell < static_cast<int64_t>(held) * side * side; cell += kThreads) {
      const int32_t local = static_cast<int32_t>(cell / (side * side));
      const int32_t within = static_cast<int32_t>(cell % (side * side));
      const Region region = region_at(grid, splits, first + local, choice[first + local]);
      const int32_t y = region.y + within / side, x = region.x + within % side;
      if (y >= grid.height || x >= grid.width) continue;
      const int32_t line = within / side / region.step, column = within % side / region.step;
      const int64_t row = starts[local] + line * region.columns + column;
      owner[grid.extra + y * grid.width + x] = held_row(row, total, padded);
      if (within / side % region.step == 0 && within % side % region.step == 0) {
        write_row(rows, row, total, image, y, x, region.step);
      }
    }
  }
  if (thread == 0) image_starts[image + 1] = static_cast<int32_t>(start < total ? start : total);
  // Rows beyond the real ones (a total that is too large) name a token that exists.
  if (image == gridDim.x - 1) {
    for (int64_t row = start + thread; row < total; row += kThreads) {
      write_row(rows, row, total, 0, 0, 0, 1);
    }
  }
}

// ---- packed rows: threadIdx.y picks the row of the block, threadIdx.x the channels ----

template <typename T, int kWidth>
__global__ void pool_kernel(const Pack<T, kWidth>* x, const int64_t* rows, int64_t count,
                            int64_t batch, Grid grid, int32_t packs, bool mean,
                            Pack<T, kWidth>* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= count) return;
  const int64_t* r = rows + 4 * row;
  const bool valid = row_is_valid(grid, batch, r);
  CUDA_KERNEL_ASSERT(valid && "a row of the plan lies outside the batch");
  if (!valid) return;
  const Square square = square_at(grid, static_cast<int32_t>(r[1]), static_cast<int32_t>(r[2]),
                                  static_cast<int32_t>(r[3]));
  const Sum<T> scale = mean ? Sum<T>(1) / square.count() : Sum<T>(1);
  x += r[0] * grid.tokens() * packs;
  for (int32_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Sum<T> sum[kWidth] = {};
    add_square<T, kWidth>(sum, x, square, grid.width, packs, pack);
    out[row * packs + pack] = rounded<T, kWidth>(sum, scale);
  }
}

template <typename T, int kWidth>
__global__ void unpool_kernel(const Pack<T, kWidth>* update, const int64_t* rows, int64_t count,
                              const int64_t* owner, int64_t tokens, int64_t batch,
                              const Pack<T, kWidth>* reference, Grid grid, int32_t packs, bool mean,
                              Pack<T, kWidth>* out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t row = owner[token];
  bool valid = row >= 0 && row < count;
  Sum<T> scale = 1;
  if (mean && valid) {
    const int64_t* r = rows + 4 * row;
    valid = row_is_valid(grid, batch, r);
    if (valid) {
      scale /= square_at(grid, static_cast<int32_t>(r[1]), static_cast<int32_t>(r[2]),
                         static_cast<int32_t>(r[3]))
                   .count();
    }
  }
  CUDA_KERNEL_ASSERT(valid && "a token is covered by no row of the plan");
  if (!valid) return;
  for (int32_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Sum<T> sum[kWidth] = {};
    add<T, kWidth>(sum, update[row * packs + pack], scale);
    if (reference != nullptr) add<T, kWidth>(sum, reference[token * packs + pack], Sum<T>(1));
    out[token * packs + pack] = rounded<T, kWidth>(sum, Sum<T>(1));
  }
}

// ---- dense rows ----

template <typename T, int kWidth>
__global__ void pool_dense_kernel(const Pack<T, kWidth>* x, const T* gate, int64_t count, Grid grid,
                                  Splits splits, int32_t packs, Pack<T, kWidth>* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= count) return;
  const int64_t image = index / splits.rows;
  const DenseRow row = dense_row_at(grid, splits, static_cast<int32_t>(index % splits.rows));
  Sum<T> scale = Sum<T>(1) / row.square.count();
  if (gate != nullptr && row.split >= 0) {
    const int64_t region = image * splits.regions() + row.region;
    scale = static_cast<Sum<T>>(gate[region * splits.count + row.split]);
  }
  x += image * grid.tokens() * packs;
  for (int32_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Sum<T> sum[kWidth] = {};
    add_square<T, kWidth>(sum, x, row.square, grid.width, packs, pack);
    out[index * packs + pack] = rounded<T, kWidth>(sum, scale);
  }
}

template <typename T, int kWidth>
__global__ void unpool_dense_kernel(const Pack<T, kWidth>* update, const T* gate,
                                    const Pack<T, kWidth>* reference, int64_t tokens, Grid grid,
                                    Splits splits, int32_t packs, Pack<T, kWidth>* out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t image = token / grid.tokens();
  const int32_t place = static_cast<int32_t>(token % grid.tokens()), cell = place - grid.extra;
  const int32_t y = cell / grid.width, x = cell % grid.width;
  update += image * splits.rows * packs;
  if (gate != nullptr && cell >= 0) {
    gate += (image * splits.regions() + splits.region_of(y, x)) * splits.count;
  }
  for (int32_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
    Sum<T> sum[kWidth] = {};
    if (cell < 0) {
      add<T, kWidth>(sum, update[static_cast<int64_t>(place) * packs + pack], Sum<T>(1));
    } else {
      for (int32_t k = 0; k < splits.count; ++k) {
        const int32_t step = splits.step[k];
        const Sum<T> weight =
            gate != nullptr
                ? static_cast<Sum<T>>(gate[k])
                : Sum<T>(1) / square_at(grid, y / step * step, x / step * step, step).count();
        const int64_t row = splits.dense_row(k, y, x);
        add<T, kWidth>(sum, update[row * packs + pack], weight);
      }
    }
    if (reference != nullptr) add<T, kWidth>(sum, reference[token * packs + pack], Sum<T>(1));
    out[token * packs + pack] = rounded<T, kWidth>(sum, Sum<T>(1));
  }
}

// One block per region; for every split the threads share tokens (y) and channels (x).
template <typename T, int kWidth>
__global__ void gate_dot_kernel(const Pack<T, kWidth>* x, const Pack<T, kWidth>* update, Grid grid,
                                Splits splits, int32_t packs, T* out) {
  __shared__ Sum<T> shared[kThreads];
  const int64_t image = blockIdx.x / splits.regions();
  const int32_t index = static_cast<int32_t>(blockIdx.x % splits.regions());
  x += image * grid.tokens() * packs;
  update += image * splits.rows * packs;
  for (int32_t k = 0; k < splits.count; ++k) {
    const Region region = region_at(grid, splits, index, k);
    const int32_t lines = smaller(splits.region, grid.height - region.y);
    const int32_t columns = smaller(splits.region, grid.width - region.x);
    Sum<T> sum = 0;
    for (int32_t t = threadIdx.y; t < lines * columns; t += blockDim.y) {
      const int32_t cell_y = region.y + t / columns, cell_x = region.x + t % columns;
      const int64_t token = grid.extra + cell_y * grid.width + cell_x;
      const int64_t row = splits.dense_row(k, cell_y, cell_x);
      for (int32_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        const Pack<T, kWidth> a = x[token * packs + pack], b = update[row * packs + pack];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sum += static_cast<Sum<T>>(a.value[i]) * static_cast<Sum<T>>(b.value[i]);
        }
      }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
      out[static_cast<int64_t>(blockIdx.x) * splits.count + k] = static_cast<T>(sum);
    }
  }
}

// ---- operators ----

Tensor region_lengths(const Tensor& choice_in, at::IntArrayRef split_values, int64_t height,
                      int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(choice_in.device());
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_choice(choice_in, splits);
  const Tensor choice = choice_in.contiguous();
  Tensor lengths = at::empty({choice.size(0)}, choice.options());
  if (choice.size(0) > 0) {
    lengths_kernel<<<image_blocks(choice.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        pointer<int64_t>(choice), grid, splits, lengths.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return lengths;
}

std::tuple<Tensor, Tensor> region_route(const Tensor& logits_in, at::IntArrayRef split_values,
                                        int64_t height, int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_logits(logits_in, splits);
  const Tensor logits = logits_in.contiguous();
  const int64_t batch = logits.size(0);
  const auto options = logits.options().dtype(at::kLong);
  Tensor choice = at::empty({batch, splits.region_rows, splits.region_columns}, options);
  Tensor lengths = at::empty({batch}, options);
  if (batch == 0) return {choice, lengths};
  PATCHREG_DISPATCH(logits, "region_route", [&] {
    route_kernel<scalar_t>
        <<<image_blocks(batch), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            pointer<scalar_t>(logits), grid, splits, choice.mutable_data_ptr<int64_t>(),
            lengths.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {choice, lengths};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> region_plan(const Tensor& choice_in,
                                                       at::IntArrayRef split_values,
                                                       int64_t height, int64_t width,
                                                       int64_t extra, int64_t total,
                                                       bool padded) {
  const c10::cuda::CUDAGuard guard(choice_in.device());
  const Tensor lengths = region_lengths(choice_in, split_values, height, width, extra);
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  const Tensor choice = choice_in.contiguous();
  const int64_t batch = choice.size(0);
  check_rows(total, batch * grid.tokens());
  Tensor rows = at::empty({total, 4}, choice.options());
  Tensor owner = at::empty({batch, grid.tokens()}, choice.options());
  Tensor starts = batch > 0 ? at::empty({batch + 1}, choice.options().dtype(at::kInt))
                            : at::zeros({1}, choice.options().dtype(at::kInt));
  if (batch > 0) {
    plan_kernel<<<image_blocks(batch), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        pointer<int64_t>(choice), pointer<int64_t>(lengths), grid, splits, total, padded,
        rows.mutable_data_ptr<int64_t>(), owner.mutable_data_ptr<int64_t>(),
        starts.mutable_data_ptr<int32_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {rows, lengths, owner, starts};
}

void region_pool_out(const Tensor& x_in, const Tensor& rows_in, const Tensor& owner, int64_t height,
                     int64_t width, int64_t extra, bool mean, const Tensor& out) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Grid grid = make_grid(height, width, extra);
  check_tokens(x_in, grid);
  check_plan(rows_in, owner, grid, x_in);
  check_out(out, x_in, {rows_in.size(0), x_in.size(2)});
  if (out.numel() == 0) return;
  const Tensor x = x_in.contiguous(), rows = rows_in.contiguous();
  const int64_t batch = x.size(0), channels = x.size(2), count = rows.size(0);
  PATCHREG_DISPATCH(x, "region_pool", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    with_width<scalar_t>(channels, {source, target}, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const Launch launch = launch_rows(count, channels / kWidth);
      pool_kernel<scalar_t, kWidth><<<launch.blocks, launch.block, 0, launch.stream>>>(
          packs_of<scalar_t, kWidth>(source), pointer<int64_t>(rows), count, batch, grid,
          static_cast<int32_t>(channels / kWidth), mean, packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  const c10::cuda::CUDAGuard guard(update_in.device());
  const Grid grid = make_grid(height, width, extra);
  check_plan(rows_in, owner_in, grid, update_in);
  TORCH_CHECK_VALUE(update_in.dim() == 2 && update_in.size(0) == rows_in.size(0),
                    "expected update [", rows_in.size(0), ", C], got ", update_in.sizes());
  const int64_t channels = update_in.size(1), count = rows_in.size(0);
  const std::vector<int64_t> shape{owner_in.size(0), owner_in.size(1), channels};
  check_out(out, update_in, shape);
  if (reference_in.has_value()) check_like(*reference_in, update_in, shape);
  if (out.numel() == 0) return;
  const Tensor update = update_in.contiguous(), rows = rows_in.contiguous();
  const Tensor owner = owner_in.contiguous();
  const std::optional<Tensor> reference = packed(reference_in);
  PATCHREG_DISPATCH(update, "region_unpool", [&] {
    const scalar_t* source = pointer<scalar_t>(update);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    with_width<scalar_t>(channels, {source, base, target}, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const Launch launch = launch_rows(owner.numel(), channels / kWidth);
      unpool_kernel<scalar_t, kWidth><<<launch.blocks, launch.block, 0, launch.stream>>>(
          packs_of<scalar_t, kWidth>(source), pointer<int64_t>(rows), count,
          pointer<int64_t>(owner), owner.numel(), owner.size(0), packs_of<scalar_t, kWidth>(base),
          grid, static_cast<int32_t>(channels / kWidth), mean, packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
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

std::vector<int64_t> gate_shape(int64_t batch, const Splits& splits) {
  return {batch, splits.region_rows, splits.region_columns, splits.count};
}

Tensor region_pool_dense(const Tensor& x_in, const std::optional<Tensor>& gate_in,
                         at::IntArrayRef split_values, int64_t height, int64_t width,
                         int64_t extra) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_tokens(x_in, grid);
  if (gate_in.has_value()) check_like(*gate_in, x_in, gate_shape(x_in.size(0), splits));
  const Tensor x = x_in.contiguous();
  const std::optional<Tensor> gate = packed(gate_in);
  const int64_t batch = x.size(0), channels = x.size(2);
  Tensor out = at::empty({batch, splits.rows, channels}, x.options());
  if (out.numel() == 0) return out;
  PATCHREG_DISPATCH(x, "region_pool_dense", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    with_width<scalar_t>(channels, {source, target}, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const Launch launch = launch_rows(batch * splits.rows, channels / kWidth);
      pool_dense_kernel<scalar_t, kWidth><<<launch.blocks, launch.block, 0, launch.stream>>>(
          packs_of<scalar_t, kWidth>(source), pointer<scalar_t>(gate), batch * splits.rows, grid,
          splits, static_cast<int32_t>(channels / kWidth), packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

Tensor region_unpool_dense(const Tensor& update_in, const std::optional<Tensor>& gate_in,
                           const std::optional<Tensor>& reference_in, at::IntArrayRef split_values,
                           int64_t height, int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(update_in.device());
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
  if (out.numel() == 0) return out;
  PATCHREG_DISPATCH(update, "region_unpool_dense", [&] {
    const scalar_t* source = pointer<scalar_t>(update);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    with_width<scalar_t>(channels, {source, base, target}, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const Launch launch = launch_rows(batch * tokens, channels / kWidth);
      unpool_dense_kernel<scalar_t, kWidth><<<launch.blocks, launch.block, 0, launch.stream>>>(
          packs_of<scalar_t, kWidth>(source), pointer<scalar_t>(gate),
          packs_of<scalar_t, kWidth>(base), batch * tokens, grid, splits,
          static_cast<int32_t>(channels / kWidth), packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

Tensor region_gate_dot(const Tensor& x_in, const Tensor& update_in, at::IntArrayRef split_values,
                       int64_t height, int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  check_tokens(x_in, grid);
  const int64_t batch = x_in.size(0), channels = x_in.size(2);
  check_like(update_in, x_in, {batch, splits.rows, channels});
  const Tensor x = x_in.contiguous(), update = update_in.contiguous();
  Tensor out = at::empty(gate_shape(batch, splits), x.options());
  if (out.numel() == 0) return out;
  PATCHREG_DISPATCH(x, "region_gate_dot", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    const scalar_t* values = pointer<scalar_t>(update);
    with_width<scalar_t>(channels, {source, values}, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const int32_t packs = static_cast<int32_t>(channels / kWidth);
      int across = 1;  // a power of two, so that the block has exactly kThreads threads
      while (across < packs && across < kThreads) across *= 2;
      const dim3 block(across, kThreads / across);
      const unsigned blocks = image_blocks(batch * splits.regions());
      gate_dot_kernel<scalar_t, kWidth>
          <<<blocks, block, 0, c10::cuda::getCurrentCUDAStream()>>>(
              packs_of<scalar_t, kWidth>(source), packs_of<scalar_t, kWidth>(values), grid, splits,
              packs, out.mutable_data_ptr<scalar_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(patchreg, CUDA, m) {
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
