// Region sampling on the CPU. One task handles whole rows; sums run in float32 for half precision.
#include "common.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define PATCHREG_X86
#include <immintrin.h>
#endif

// One source, several instruction sets: the loader picks the widest one this processor has.
#if defined(PATCHREG_X86) && defined(__linux__) && !defined(__clang__)
#define PATCHREG_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PATCHREG_CLONES
#endif
#if defined(__GNUC__)
#define PATCHREG_INLINE inline __attribute__((always_inline))
#else
#define PATCHREG_INLINE inline
#endif

namespace patchreg {
namespace {

using at::Tensor;
using c10::BFloat16;
using c10::Half;

constexpr int64_t kChunk = 512;  // channels summed at once, so that the sums stay in the L1 cache
constexpr int64_t kLanes = 16;
constexpr int64_t kLead = 64 << 10;  // bytes that reading runs ahead: about one line of regions
constexpr int64_t kLarge = 8 << 20;  // an output this large has left the cache when it is read

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- vector loops over the channels of a row ----

template <int kTokens, typename T>
PATCHREG_INLINE void add_group(Sum<T>* sum, const T* source, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Sum<T> value = sum[i];
    for (int k = 0; k < kTokens; ++k) value += static_cast<Sum<T>>(source[k * stride + i]);
    sum[i] = value;
  }
}

template <typename T>
PATCHREG_INLINE void add_line(Sum<T>* sum, const T* source, int64_t tokens, int64_t stride,
                              int64_t n) {
  for (; tokens >= 4; tokens -= 4, source += 4 * stride) add_group<4, T>(sum, source, stride, n);
  for (; tokens >= 2; tokens -= 2, source += 2 * stride) add_group<2, T>(sum, source, stride, n);
  if (tokens == 1) add_group<1, T>(sum, source, stride, n);
}

template <typename T>
PATCHREG_INLINE void store(T* out, const Sum<T>* sum, Sum<T> scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(sum[i] * scale);
}

template <typename T>
PATCHREG_INLINE void add_scaled(Sum<T>* sum, const T* source, Sum<T> scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<Sum<T>>(source[i]) * scale;
}

template <typename T>
PATCHREG_INLINE void add_two(T* out, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(static_cast<Sum<T>>(a[i]) + static_cast<Sum<T>>(b[i]));
  }
}

template <typename T>
PATCHREG_INLINE Sum<T> dot(const Sum<T>* a, const T* b, int64_t n) {
  Sum<T> lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * static_cast<Sum<T>>(b[i + j]);
  }
  for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += a[i] * static_cast<Sum<T>>(b[i]);
  Sum<T> total = 0;
  for (const Sum<T> lane : lanes) total += lane;
  return total;
}

// target_clones takes no templates, so every type gets its own set of functions.
#define PATCHREG_LOOPS(T)                                                                         \
  PATCHREG_CLONES void line_sum(Sum<T>* sum, const T* source, int64_t tokens, int64_t stride,     \
                                int64_t n) {                                                      \
    add_line<T>(sum, source, tokens, stride, n);                                                  \
  }                                                                                               \
  PATCHREG_CLONES void scale_into(T* out, const Sum<T>* sum, Sum<T> scale, int64_t n) {           \
    store<T>(out, sum, scale, n);                                                                 \
  }                                                                                               \
  PATCHREG_CLONES void scaled_sum(Sum<T>* sum, const T* source, Sum<T> scale, int64_t n) {        \
    add_scaled<T>(sum, source, scale, n);                                                         \
  }                                                                                               \
  PATCHREG_CLONES void sum_of_two(T* out, const T* a, const T* b, int64_t n) {                    \
    add_two<T>(out, a, b, n);                                                                     \
  }                                                                                               \
  PATCHREG_CLONES Sum<T> dot_of(const Sum<T>* a, const T* b, int64_t n) { return dot<T>(a, b, n); }

PATCHREG_LOOPS(float)
PATCHREG_LOOPS(double)
PATCHREG_LOOPS(BFloat16)
#undef PATCHREG_LOOPS

// Compilers do not vectorise the float16 conversions, so those go through float32 in bulk.
#if defined(PATCHREG_X86)
const bool kHasF16c = __builtin_cpu_supports("f16c");

__attribute__((target("avx,f16c"))) int64_t widen_f16c(float* out, const Half* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(bits));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t narrow_f16c(Half* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bits);
  }
  return i;
}
#else
constexpr bool kHasF16c = false;
int64_t widen_f16c(float*, const Half*, int64_t) { return 0; }
int64_t narrow_f16c(Half*, const float*, int64_t) { return 0; }
#endif

void widen(float* out, const Half* in, int64_t n) {
  for (int64_t i = kHasF16c ? widen_f16c(out, in, n) : 0; i < n; ++i) out[i] = in[i];
}

void narrow(Half* out, const float* in, int64_t n) {
  for (int64_t i = kHasF16c ? narrow_f16c(out, in, n) : 0; i < n; ++i) out[i] = in[i];
}

void line_sum(float* sum, const Half* source, int64_t tokens, int64_t stride, int64_t n) {
  float wide[kChunk];
  for (int64_t k = 0; k < tokens; ++k) {
    widen(wide, source + k * stride, n);
    line_sum(sum, wide, 1, 0, n);
  }
}

void scale_into(Half* out, const float* sum, float scale, int64_t n) {
  float wide[kChunk];
  scale_into(wide, sum, scale, n);
  narrow(out, wide, n);
}

void scaled_sum(float* sum, const Half* source, float scale, int64_t n) {
  float wide[kChunk];
  widen(wide, source, n);
  scaled_sum(sum, wide, scale, n);
}

void sum_of_two(Half* out, const Half* a, const Half* b, int64_t n) {
  float left[kChunk], right[kChunk];
  for (int64_t from = 0; from < n; from += kChunk) {
    const int64_t count = std::min(kChunk, n - from);
    widen(left, a + from, count);
    widen(right, b + from, count);
    sum_of_two(left, left, right, count);
    narrow(out + from, left, count);
  }
}

float dot_of(const float* a, const Half* b, int64_t n) {
  float wide[kChunk];
  widen(wide, b, n);
  return dot_of(a, wide, n);
}

// ---- rows ----

template <typename T>
void square_sum(Sum<T>* sum, const T* image, const Square& square, int64_t width, int64_t channels,
                int64_t from, int64_t n) {
  std::fill(sum, sum + n, Sum<T>(0));
  const T* line = image + square.token * channels + from;
  for (int32_t i = 0; i < square.lines; ++i, line += width * channels) {
    line_sum(sum, line, square.columns, channels, n);
  }
}

// Rows hop between the lines of an image; this asks for the image in the order of memory instead.
struct ReadAhead {
  const char* next;
  const char* end;

  void advance(int64_t bytes) {
#if defined(__GNUC__)
    for (const char* to = std::min(next + bytes, end); next < to; next += 64) {
      __builtin_prefetch(next);
    }
#endif
  }
};

// Writes whole cache lines without reading them first.
void stream(void* out, const void* in, int64_t bytes) {
#if defined(PATCHREG_X86)
  auto* to = static_cast<__m128i*>(out);
  const auto* from = static_cast<const __m128i*>(in);
  for (int64_t i = 0; i < bytes / 16; i += 4) {
    const __m128i a = _mm_loadu_si128(from + i), b = _mm_loadu_si128(from + i + 1);
    const __m128i c = _mm_loadu_si128(from + i + 2), d = _mm_loadu_si128(from + i + 3);
    _mm_stream_si128(to + i, a), _mm_stream_si128(to + i + 1, b);
    _mm_stream_si128(to + i + 2, c), _mm_stream_si128(to + i + 3, d);
  }
#else
  std::memcpy(out, in, bytes);
#endif
}

void finish_stream() {
#if defined(PATCHREG_X86)
  _mm_sfence();
#endif
}

bool may_stream(const Tensor& out, int64_t row_bytes) {
  return static_cast<int64_t>(out.nbytes()) >= kLarge && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

template <typename T>
void pool_row(T* out, const T* image, const Square& square, int64_t width, int64_t channels,
              Sum<T> scale, bool streaming) {
  if (square.count() == 1 && scale == Sum<T>(1)) {
    const T* token = image + square.token * channels;
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
    streaming ? stream(out, token, bytes) : static_cast<void>(std::memcpy(out, token, bytes));
    return;
  }
  Sum<T> sum[kChunk];
  T row[kChunk];
  for (int64_t from = 0; from < channels; from += kChunk) {
    const int64_t n = std::min(kChunk, channels - from);
    square_sum(sum, image, square, width, channels, from, n);
    scale_into(streaming ? row : out + from, sum, scale, n);
    if (streaming) stream(out + from, row, n * sizeof(T));
  }
}

template <typename T>
void copy_row(T* out, const T* update, const T* reference, int64_t channels) {
  if (reference != nullptr) {
    sum_of_two(out, update, reference, channels);
  } else {
    std::memcpy(out, update, channels * sizeof(T));
  }
}

int64_t rows_per_task(int64_t channels) { return std::max<int64_t>(1, 32768 / (channels + 1)); }

template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(tensor->contiguous()) : std::nullopt;
}

#define PATCHREG_DISPATCH(TENSOR, NAME, ...)                                              \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), NAME, \
                                  __VA_ARGS__)

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

std::tuple<Tensor, Tensor, Tensor> region_plan(const Tensor& choice_in,
                                               at::IntArrayRef split_values, int64_t height,
                                               int64_t width, int64_t extra, int64_t total) {
  const Tensor lengths = region_lengths(choice_in, split_values, height, width, extra);
  const Grid grid = make_grid(height, width, extra);
  const Splits splits = make_splits(split_values, grid);
  const Tensor choice = choice_in.contiguous();
  const int64_t batch = choice.size(0), regions = splits.regions();
  const int64_t* length = pointer<int64_t>(lengths);
  std::vector<int64_t> start(batch + 1, 0);
  for (int64_t b = 0; b < batch; ++b) start[b + 1] = start[b] + length[b];
  TORCH_CHECK_VALUE(start[batch] == total, "total is ", total, ", but the choice makes ",
                    start[batch], " rows. Pass total=None or the sum of row_lengths().");

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
        int64_t* place = row_out + 4 * row;
        place[0] = b, place[1] = y, place[2] = x, place[3] = step;
        const Square square = square_at(grid, static_cast<int32_t>(y), static_cast<int32_t>(x),
                                        static_cast<int32_t>(step));
        for (int64_t i = 0; i < square.lines; ++i) {
          std::fill_n(covers + square.token + i * width, square.columns, row);
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
  return {rows, lengths, owner};
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
