// Region sampling fused with the layer norms around it, on CUDA devices: one warp per row of channels,
// which stays in registers between the sums and the norm. No atomics, no host sync.
#include "fused.h"

#include "cuda_rows.cuh"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

namespace patchreg {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // per block

template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Layer norm of one row by one warp. `value(pack)` makes a pack of the row, rounded as it is stored, and
// `keep(pack, value)` sees each one once. Up to `kHeld` packs per lane stay in registers; 0 makes each
// pack three times instead, for rows of any length.
template <typename T, int kWidth, int kHeld, typename Value, typename Keep>
__device__ __forceinline__ void norm_row(int32_t packs, const Value& value, const Keep& keep,
                                         const Pack<T, kWidth>* weight, const Pack<T, kWidth>* bias,
                                         Sum<T> eps, Pack<T, kWidth>* out) {
  using V = Sum<T>;
  const int lane = threadIdx.x;
  const V channels = static_cast<V>(packs) * kWidth;
  Pack<T, kWidth> held[kHeld > 0 ? kHeld : 1];
  const auto each = [&](auto&& visit) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        if (lane + h * kLanes < packs) visit(lane + h * kLanes, held[h]);
      }
    } else {
      for (int32_t pack = lane; pack < packs; pack += kLanes) {
        held[0] = value(pack);
        visit(pack, held[0]);
      }
    }
  };

  V sum = 0;
  each([&](int32_t pack, Pack<T, kWidth>& row) {
    if constexpr (kHeld > 0) row = value(pack);
    keep(pack, row);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += static_cast<V>(row.value[i]);
  });
  const V mean = warp_sum(sum) / channels;
  V squares = 0;
  each([&](int32_t, const Pack<T, kWidth>& row) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const V distance = static_cast<V>(row.value[i]) - mean;
      squares += distance * distance;
    }
  });
  const V scale = V(1) / sqrt(warp_sum(squares) / channels + eps);
  each([&](int32_t pack, const Pack<T, kWidth>& row) {
    const Pack<T, kWidth> w = weight[pack], b = bias[pack];
    Pack<T, kWidth> normed;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const V value_i = (static_cast<V>(row.value[i]) - mean) * scale;
      normed.value[i] =
          static_cast<T>(value_i * static_cast<V>(w.value[i]) + static_cast<V>(b.value[i]));
    }
    out[pack] = normed;
  });
}

template <typename T, int kWidth, int kHeld>
__global__ void sum_norm_kernel(const Pack<T, kWidth>* x, const Pack<T, kWidth>* update,
                                const Pack<T, kWidth>* weight, const Pack<T, kWidth>* bias,
                                Sum<T> eps, int64_t count, int32_t packs, Pack<T, kWidth>* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  x += row * packs;
  update += row * packs;
  const auto value = [&](int32_t pack) {
    Sum<T> sum[kWidth] = {};
    add<T, kWidth>(sum, x[pack], Sum<T>(1));
    add<T, kWidth>(sum, update[pack], Sum<T>(1));
    return rounded<T, kWidth>(sum, Sum<T>(1));
  };
  norm_row<T, kWidth, kHeld>(
      packs, value, [](int32_t, const Pack<T, kWidth>&) {}, weight, bias, eps, out + row * packs);
}

template <typename T, int kWidth, int kHeld>
__global__ void pool_norm_kernel(const Pack<T, kWidth>* x, const int64_t* rows, int64_t count,
                                 int64_t batch, Grid grid, const Pack<T, kWidth>* weight,
                                 const Pack<T, kWidth>* bias, Sum<T> eps, int32_t packs,
                                 Pack<T, kWidth>* pooled, Pack<T, kWidth>* normed) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  const int64_t* r = rows + 4 * row;
  const bool valid = row_is_valid(grid, batch, r);
  CUDA_KERNEL_ASSERT(valid && "a row of the plan lies outside the batch");
  if (!valid) return;
  const Square square = square_at(grid, static_cast<int32_t>(r[1]), static_cast<int32_t>(r[2]),
                                  static_cast<int32_t>(r[3]));
  const Sum<T> scale = Sum<T>(1) / square.count();
  x += r[0] * grid.tokens() * packs;
  pooled += row * packs;
  const auto value = [&](int32_t pack) {
    Sum<T> sum[kWidth] = {};
    add_square<T, kWidth>(sum, x, square, grid.width, packs, pack);
    return rounded<T, kWidth>(sum, scale);
  };
  const auto keep = [&](int32_t pack, const Pack<T, kWidth>& mean) { pooled[pack] = mean; };
  norm_row<T, kWidth, kHeld>(packs, value, keep, weight, bias, eps, normed + row * packs);
}

// The first blocks take one region each, whose tokens their warps share and whose mean they form from
// what they have just written; the blocks behind them take the extra tokens.
template <typename T, int kWidth, int kHeld>
__global__ void unpool_norm_kernel(const Pack<T, kWidth>* first, const Pack<T, kWidth>* second,
                                   int64_t count, const int64_t* owner, int64_t batch,
                                   const Pack<T, kWidth>* reference, Grid grid, int32_t region,
                                   const Pack<T, kWidth>* weight, const Pack<T, kWidth>* bias,
                                   Sum<T> eps, int32_t packs, Pack<T, kWidth>* out,
                                   Pack<T, kWidth>* normed, Sum<T>* means) {
  const auto token = [&](int64_t t) {
    const int64_t row = owner[t];
    const bool valid = row >= 0 && row < count;
    CUDA_KERNEL_ASSERT(valid && "a token is covered by no row of the plan");
    if (!valid) return;  // All lanes of a warp hold the same token.
    const auto value = [&](int32_t pack) {
      Sum<T> sum[kWidth] = {};
      add<T, kWidth>(sum, first[row * packs + pack], Sum<T>(1));
      add<T, kWidth>(sum, second[row * packs + pack], Sum<T>(1));
      add<T, kWidth>(sum, reference[t * packs + pack], Sum<T>(1));
      return rounded<T, kWidth>(sum, Sum<T>(1));
    };
    const auto keep = [&](int32_t pack, const Pack<T, kWidth>& total) {
      out[t * packs + pack] = total;
    };
    norm_row<T, kWidth, kHeld>(packs, value, keep, weight, bias, eps, normed + t * packs);
  };

  const int32_t across = ceil_div(grid.width, region), down = ceil_div(grid.height, region);
  const int64_t regions = batch * across * down;
  if (blockIdx.x >= regions) {
    const int64_t number = (static_cast<int64_t>(blockIdx.x) - regions) * kWarps + threadIdx.y;
    if (number >= batch * grid.extra) return;
    token(number / grid.extra * grid.tokens() + number % grid.extra);
    return;
  }
  const int64_t image = static_cast<int64_t>(blockIdx.x) / (across * down);
  const int32_t cell = static_cast<int32_t>(static_cast<int64_t>(blockIdx.x) % (across * down));
  const Square square = square_at(grid, cell / across * region, cell % across * region, region);
  const int64_t corner = image * grid.tokens() + square.token;
  for (int32_t i = threadIdx.y; i < square.count(); i += kWarps) {
    token(corner + i / square.columns * grid.width + i % square.columns);
  }
  __syncthreads();
  means += static_cast<int64_t>(blockIdx.x) * packs * kWidth;
  out += image * grid.tokens() * packs;
  const Sum<T> share = Sum<T>(1) / square.count();
  for (int32_t pack = threadIdx.x + threadIdx.y * kLanes; pack < packs; pack += kLanes * kWarps) {
    Sum<T> sum[kWidth] = {};
    add_square<T, kWidth>(sum, out, square, grid.width, packs, pack);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) means[pack * kWidth + i] = sum[i] * share;
  }
}

// ---- launches ----

// Calls `body(width, held)`: 16-byte packs where channels and addresses allow, in registers where they fit.
template <typename T, typename Body>
void with_row(int64_t channels, std::initializer_list<const void*> addresses, Body&& body) {
  with_width<T>(channels, addresses, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth > 1 && sizeof(T) < 8) {
      const int64_t packs = channels / kWidth;
      if (packs <= 2 * kLanes) return body(width, std::integral_constant<int, 2>{});
      if (packs <= 4 * kLanes) return body(width, std::integral_constant<int, 4>{});
      if (packs <= 8 * kLanes) return body(width, std::integral_constant<int, 8>{});
    }
    body(width, std::integral_constant<int, 0>{});
  });
}

unsigned row_blocks(int64_t rows) { return image_blocks((rows + kWarps - 1) / kWarps); }

Tensor sum_norm(const Tensor& x_in, const Tensor& update_in, const Tensor& weight_in,
                const Tensor& bias_in, double eps) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  TORCH_CHECK_VALUE(x_in.dim() >= 1, "expected x [..., C], got ", x_in.sizes());
  const int64_t channels = x_in.size(-1);
  check_norm(weight_in, bias_in, x_in, channels);
  check_like(update_in, x_in, x_in.sizes());
  const Tensor x = x_in.contiguous(), update = update_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  Tensor normed = at::empty(x.sizes(), x.options());
  if (normed.numel() == 0) return normed;
  const int64_t rows = x.numel() / channels;
  PATCHREG_DISPATCH(x, "sum_norm", [&] {
    const scalar_t *left = pointer<scalar_t>(x), *right = pointer<scalar_t>(update);
    const scalar_t *w = pointer<scalar_t>(weight), *b = pointer<scalar_t>(bias);
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    with_row<scalar_t>(channels, {left, right, w, b, target}, [&](auto width, auto held) {
      constexpr int kWidth = decltype(width)::value, kHeld = decltype(held)::value;
      sum_norm_kernel<scalar_t, kWidth, kHeld>
          <<<row_blocks(rows), dim3(kLanes, kWarps), 0, c10::cuda::getCurrentCUDAStream()>>>(
              packs_of<scalar_t, kWidth>(left), packs_of<scalar_t, kWidth>(right),
              packs_of<scalar_t, kWidth>(w), packs_of<scalar_t, kWidth>(b),
              static_cast<Sum<scalar_t>>(eps), rows, static_cast<int32_t>(channels / kWidth),
              packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return normed;
}

std::tuple<Tensor, Tensor> region_pool_norm(const Tensor& x_in, const Tensor& rows_in,
                                            const Tensor& owner, const Tensor& weight_in,
                                            const Tensor& bias_in, double eps, int64_t height,
                                            int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Grid grid = make_grid(height, width, extra);
  check_tokens(x_in, grid);
  check_plan(rows_in, owner, grid, x_in);
  const int64_t batch = x_in.size(0), channels = x_in.size(2), count = rows_in.size(0);
  check_norm(weight_in, bias_in, x_in, channels);
  const Tensor x = x_in.contiguous(), rows = rows_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  Tensor pooled = at::empty({count, channels}, x.options());
  Tensor normed = at::empty({count, channels}, x.options());
  if (count == 0) return {pooled, normed};
  PATCHREG_DISPATCH(x, "region_pool_norm", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    const scalar_t *w = pointer<scalar_t>(weight), *b = pointer<scalar_t>(bias);
    scalar_t* means = pooled.mutable_data_ptr<scalar_t>();
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    with_row<scalar_t>(channels, {source, w, b, means, target}, [&](auto width, auto held) {
      constexpr int kWidth = decltype(width)::value, kHeld = decltype(held)::value;
      pool_norm_kernel<scalar_t, kWidth, kHeld>
          <<<row_blocks(count), dim3(kLanes, kWarps), 0, c10::cuda::getCurrentCUDAStream()>>>(
              packs_of<scalar_t, kWidth>(source), pointer<int64_t>(rows), count, batch, grid,
              packs_of<scalar_t, kWidth>(w), packs_of<scalar_t, kWidth>(b),
              static_cast<Sum<scalar_t>>(eps), static_cast<int32_t>(channels / kWidth),
              packs_of<scalar_t, kWidth>(means), packs_of<scalar_t, kWidth>(target));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {pooled, normed};
}

std::tuple<Tensor, Tensor, Tensor> region_unpool_norm(
    const Tensor& first_in, const Tensor& second_in, const Tensor& owner_in,
    const Tensor& reference_in, const Tensor& weight_in, const Tensor& bias_in, double eps,
    int64_t region, int64_t height, int64_t width, int64_t extra) {
  const c10::cuda::CUDAGuard guard(reference_in.device());
  const Grid grid = make_grid(height, width, extra);
  check_region(region);
  check_tokens(reference_in, grid);
  const int64_t batch = reference_in.size(0), channels = reference_in.size(2);
  TORCH_CHECK_VALUE(first_in.dim() == 2, "expected updates [L, C], got ", first_in.sizes());
  const int64_t count = first_in.size(0);
  check_like(first_in, reference_in, {count, channels});
  check_like(second_in, reference_in, {count, channels});
  check_owner(owner_in, reference_in, grid);
  check_norm(weight_in, bias_in, reference_in, channels);
  const Tensor first = first_in.contiguous(), second = second_in.contiguous();
  const Tensor owner = owner_in.contiguous(), reference = reference_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  const int32_t side = static_cast<int32_t>(region);
  const int64_t down = ceil_div(grid.height, side), across = ceil_div(grid.width, side);
  Tensor out = at::empty(reference.sizes(), reference.options());
  Tensor normed = at::empty(reference.sizes(), reference.options());
  Tensor means = at::empty({batch, down, across, channels},
                           reference.options().dtype(mean_type(reference)));
  if (batch == 0) return {out, normed, means};
  const unsigned blocks =
      image_blocks(batch * down * across + (batch * extra + kWarps - 1) / kWarps);
  PATCHREG_DISPATCH(reference, "region_unpool_norm", [&] {
    const scalar_t *one = pointer<scalar_t>(first), *two = pointer<scalar_t>(second);
    const scalar_t *w = pointer<scalar_t>(weight), *b = pointer<scalar_t>(bias);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    Sum<scalar_t>* averages = means.mutable_data_ptr<Sum<scalar_t>>();
    with_row<scalar_t>(channels, {one, two, w, b, base, sums, target}, [&](auto width, auto held) {
      constexpr int kWidth = decltype(width)::value, kHeld = decltype(held)::value;
      unpool_norm_kernel<scalar_t, kWidth, kHeld>
          <<<blocks, dim3(kLanes, kWarps), 0, c10::cuda::getCurrentCUDAStream()>>>(
              packs_of<scalar_t, kWidth>(one), packs_of<scalar_t, kWidth>(two), count,
              pointer<int64_t>(owner), batch, packs_of<scalar_t, kWidth>(base), grid, side,
              packs_of<scalar_t, kWidth>(w), packs_of<scalar_t, kWidth>(b),
              static_cast<Sum<scalar_t>>(eps), static_cast<int32_t>(channels / kWidth),
              packs_of<scalar_t, kWidth>(sums), packs_of<scalar_t, kWidth>(target), averages);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {out, normed, means};
}

}  // namespace

TORCH_LIBRARY_IMPL(patchreg, CUDA, m) {
  m.impl("sum_norm", &sum_norm);
  m.impl("region_pool_norm", &region_pool_norm);
  m.impl("region_unpool_norm", &region_unpool_norm);
}

}  // namespace patchreg
