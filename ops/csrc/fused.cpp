// Region sampling fused with the layer norms around it, on the CPU. Each row of channels is read once
// and normed while it lies in the L1 cache.
#include "fused.h"

#include "cpu_rows.h"

#include <cmath>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace patchreg {
namespace {

#if defined(__GNUC__)
// 64 bytes of one type; compilers leave plain arrays of partial sums in memory instead.
template <typename V>
struct Wide {
  typedef V type __attribute__((vector_size(64)));
};

template <bool kSquares, typename V>
PATCHREG_INLINE void accumulate(typename Wide<V>::type& sum, const V* row, V mean) {
  typename Wide<V>::type value;
  __builtin_memcpy(&value, row, 64);
  value -= mean;
  sum += kSquares ? value * value : value;
}

// Sum of the distances to the mean or of their squares, in several running sums, so that no addition
// waits for the last one.
template <bool kSquares, typename V>
PATCHREG_INLINE V sum_of(const V* row, V mean, int64_t n) {
  constexpr int64_t kHeld = 64 / sizeof(V);
  typename Wide<V>::type a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * kHeld <= n; i += 4 * kHeld) {
    accumulate<kSquares>(a, row + i, mean);
    accumulate<kSquares>(b, row + i + kHeld, mean);
    accumulate<kSquares>(c, row + i + 2 * kHeld, mean);
    accumulate<kSquares>(d, row + i + 3 * kHeld, mean);
  }
  for (; i + kHeld <= n; i += kHeld) accumulate<kSquares>(a, row + i, mean);
  a = (a + b) + (c + d);
  V total = 0;
  for (int64_t j = 0; j < kHeld; ++j) total += a[j];
  for (; i < n; ++i) total += kSquares ? (row[i] - mean) * (row[i] - mean) : row[i] - mean;
  return total;
}
#else
template <bool kSquares, typename V>
PATCHREG_INLINE V sum_of(const V* row, V mean, int64_t n) {
  V lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const V distance = row[i] - mean;
    lanes[i % kLanes] += kSquares ? distance * distance : distance;
  }
  V total = 0;
  for (const V lane : lanes) total += lane;
  return total;
}
#endif

template <typename V>
PATCHREG_INLINE void normalise(V* out, const V* row, const V* weight, const V* bias, V eps,
                               int64_t n) {
  const V mean = sum_of<false>(row, V(0), n) / static_cast<V>(n);
  const V scale = V(1) / std::sqrt(sum_of<true>(row, mean, n) / static_cast<V>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (row[i] - mean) * scale * weight[i] + bias[i];
}

PATCHREG_CLONES void norm_row(float* out, const float* row, const float* weight,
                              const float* bias, float eps, int64_t n) {
  normalise(out, row, weight, bias, eps, n);
}

PATCHREG_CLONES void norm_row(double* out, const double* row, const double* weight,
                              const double* bias, double eps, int64_t n) {
  normalise(out, row, weight, bias, eps, n);
}

PATCHREG_CLONES void add_three(float* out, const float* a, const float* b, const float* c,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i] + c[i];
}

PATCHREG_CLONES void add_three(double* out, const double* a, const double* b, const double* c,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i] + c[i];
}

// Half precision works on rows in float32, rounded where they are stored.
template <typename T>
void load_row(Sum<T>* out, const T* in, int64_t n) {
  std::fill(out, out + n, Sum<T>(0));
  for (int64_t from = 0; from < n; from += kChunk) {
    line_sum(out + from, in + from, 1, 0, std::min(kChunk, n - from));
  }
}

template <typename T>
void add_row(Sum<T>* sum, const T* in, int64_t n) {
  for (int64_t from = 0; from < n; from += kChunk) {
    line_sum(sum + from, in + from, 1, 0, std::min(kChunk, n - from));
  }
}

template <typename T>
void store_row(T* out, const Sum<T>* row, Sum<T> scale, int64_t n) {
  for (int64_t from = 0; from < n; from += kChunk) {
    scale_into(out + from, row + from, scale, std::min(kChunk, n - from));
  }
}

template <typename T>
void sum_three(T* out, const T* a, const T* b, const T* c, std::vector<Sum<T>>& work, int64_t n) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    add_three(out, a, b, c, n);
  } else {
    load_row(work.data(), a, n);
    add_row(work.data(), b, n);
    add_row(work.data(), c, n);
    store_row(out, work.data(), Sum<T>(1), n);
  }
}

// Layer norm of stored rows, with its parameters and one row of working memory in Sum<T>.
template <typename T>
class Norm {
 public:
  Norm(const Tensor& weight, const Tensor& bias, double eps, int64_t channels)
      : channels_(channels), eps_(static_cast<Sum<T>>(eps)), weight_(channels), bias_(channels) {
    load_row(weight_.data(), pointer<T>(weight), channels);
    load_row(bias_.data(), pointer<T>(bias), channels);
  }

  // `row` is read in the precision in which it was stored.
  void operator()(T* out, const T* row, std::vector<Sum<T>>& work) const {
    if constexpr (std::is_same_v<T, Sum<T>>) {
      norm_row(out, row, weight_.data(), bias_.data(), eps_, channels_);
    } else {
      load_row(work.data(), row, channels_);
      norm_row(work.data(), work.data(), weight_.data(), bias_.data(), eps_, channels_);
      store_row(out, work.data(), Sum<T>(1), channels_);
    }
  }

 private:
  int64_t channels_;
  Sum<T> eps_;
  std::vector<Sum<T>> weight_, bias_;
};

Tensor sum_norm(const Tensor& x_in, const Tensor& update_in, const Tensor& weight_in,
                const Tensor& bias_in, double eps) {
  TORCH_CHECK_VALUE(x_in.dim() >= 1, "expected x [..., C], got ", x_in.sizes());
  const int64_t channels = x_in.size(-1);
  check_norm(weight_in, bias_in, x_in, channels);
  check_like(update_in, x_in, x_in.sizes());
  const Tensor x = x_in.contiguous(), update = update_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  Tensor normed = at::empty(x.sizes(), x.options());
  const int64_t rows = x.numel() / channels;
  PATCHREG_DISPATCH(x, "sum_norm", [&] {
    const scalar_t* left = pointer<scalar_t>(x);
    const scalar_t* right = pointer<scalar_t>(update);
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    const Norm<scalar_t> norm(weight, bias, eps, channels);
    at::parallel_for(0, rows, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      std::vector<Sum<scalar_t>> work(channels);
      for (int64_t at = begin * channels; at < end * channels; at += channels) {
        sum_of_two(target + at, left + at, right + at, channels);
        norm(target + at, target + at, work);
      }
    });
  });
  return normed;
}

std::tuple<Tensor, Tensor> region_pool_norm(const Tensor& x_in, const Tensor& rows_in,
                                            const Tensor& owner, const Tensor& weight_in,
                                            const Tensor& bias_in, double eps, int64_t height,
                                            int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  check_tokens(x_in, grid);
  check_plan(rows_in, owner, grid, x_in);
  const int64_t batch = x_in.size(0), channels = x_in.size(2), count = rows_in.size(0);
  check_norm(weight_in, bias_in, x_in, channels);
  const Tensor x = x_in.contiguous(), rows = rows_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  Tensor pooled = at::empty({count, channels}, x.options()), normed = at::empty({count, channels}, x.options());
  const int64_t* row = pointer<int64_t>(rows);
  PATCHREG_DISPATCH(x, "region_pool_norm", [&] {
    const scalar_t* source = pointer<scalar_t>(x);
    scalar_t* means = pooled.mutable_data_ptr<scalar_t>();
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    const Norm<scalar_t> norm(weight, bias, eps, channels);
    at::parallel_for(0, count, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      std::vector<Sum<scalar_t>> work(channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t* r = row + 4 * i;
        TORCH_CHECK_INDEX(row_is_valid(grid, batch, r), "row ", i, " of the plan, (", r[0], ", ",
                          r[1], ", ", r[2], ", ", r[3], "), lies outside the batch");
        const Square square = square_at(grid, static_cast<int32_t>(r[1]),
                                        static_cast<int32_t>(r[2]), static_cast<int32_t>(r[3]));
        pool_row(means + i * channels, source + r[0] * grid.tokens() * channels, square, width,
                 channels, Sum<scalar_t>(1) / square.count(), false);
        norm(target + i * channels, means + i * channels, work);
      }
    });
  });
  return {pooled, normed};
}

std::tuple<Tensor, Tensor, Tensor> region_unpool_norm(
    const Tensor& first_in, const Tensor& second_in, const Tensor& owner_in,
    const Tensor& reference_in, const Tensor& weight_in, const Tensor& bias_in, double eps,
    int64_t region, int64_t height, int64_t width, int64_t extra) {
  const Grid grid = make_grid(height, width, extra);
  check_region(region);
  check_tokens(reference_in, grid);
  const int64_t batch = reference_in.size(0), channels = reference_in.size(2);
  TORCH_CHECK_VALUE(first_in.dim() == 2, "expected updates [L, C], got ", first_in.sizes());
  const int64_t count = first_in.size(0), tokens = grid.tokens();
  check_like(first_in, reference_in, {count, channels});
  check_like(second_in, reference_in, {count, channels});
  check_owner(owner_in, reference_in, grid);
  check_norm(weight_in, bias_in, reference_in, channels);
  const Tensor first = first_in.contiguous(), second = second_in.contiguous();
  const Tensor owner = owner_in.contiguous(), reference = reference_in.contiguous();
  const Tensor weight = weight_in.contiguous(), bias = bias_in.contiguous();
  const int64_t strips = ceil_div(grid.height, static_cast<int32_t>(region));
  const int64_t columns = ceil_div(grid.width, static_cast<int32_t>(region));
  Tensor out = at::empty(reference.sizes(), reference.options());
  Tensor normed = at::empty(reference.sizes(), reference.options());
  Tensor means = at::empty({batch, strips, columns, channels},
                           reference.options().dtype(mean_type(reference)));
  const int64_t* covering = pointer<int64_t>(owner);
  PATCHREG_DISPATCH(reference, "region_unpool_norm", [&] {
    const scalar_t* one = pointer<scalar_t>(first);
    const scalar_t* two = pointer<scalar_t>(second);
    const scalar_t* base = pointer<scalar_t>(reference);
    scalar_t* sums = out.mutable_data_ptr<scalar_t>();
    scalar_t* target = normed.mutable_data_ptr<scalar_t>();
    Sum<scalar_t>* averages = means.mutable_data_ptr<Sum<scalar_t>>();
    const Norm<scalar_t> norm(weight, bias, eps, channels);
    const int64_t grain = rows_per_task(channels * region * width);
    // A task is a line of regions, so that one thread adds up what a region holds.
    at::parallel_for(0, batch * strips, grain, [&](int64_t begin, int64_t end) {
      std::vector<Sum<scalar_t>> work(channels);
      const auto token = [&](int64_t t) {
        const int64_t i = covering[t];
        TORCH_CHECK_INDEX(i >= 0 && i < count, "token ", t, " is covered by row ", i,
                          ", the updates have ", count);
        sum_three(sums + t * channels, one + i * channels, two + i * channels,
                  base + t * channels, work, channels);
        norm(target + t * channels, sums + t * channels, work);
      };
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t b = strip / strips, top = strip % strips * region;
        const int64_t image = b * tokens;
        if (top == 0) {
          for (int64_t t = 0; t < extra; ++t) token(image + t);
        }
        Sum<scalar_t>* line_of_means = averages + strip * columns * channels;
        std::fill(line_of_means, line_of_means + columns * channels, Sum<scalar_t>(0));
        const int64_t bottom = std::min(top + region, height);
        for (int64_t y = top; y < bottom; ++y) {
          for (int64_t x = 0; x < width; ++x) {
            const int64_t t = image + extra + y * width + x;
            token(t);
            add_row(line_of_means + x / region * channels, sums + t * channels, channels);
          }
        }
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t across = std::min(region, width - column * region);
          const Sum<scalar_t> share = Sum<scalar_t>(1) / (across * (bottom - top));
          store_row(line_of_means + column * channels, line_of_means + column * channels, share,
                    channels);
        }
      }
    });
  });
  return {out, normed, means};
}

}  // namespace

TORCH_LIBRARY_IMPL(patchreg, CPU, m) {
  m.impl("sum_norm", &sum_norm);
  m.impl("region_pool_norm", &region_pool_norm);
  m.impl("region_unpool_norm", &region_unpool_norm);
}

}  // namespace patchreg
