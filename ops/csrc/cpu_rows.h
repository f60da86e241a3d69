// Rows of channels on the CPU: vector loops, pooling and copying, in every floating type.
#pragma once

#include "common.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include <ATen/Dispatch.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define PATCHREG_X86
#include <immintrin.h>
#endif

// One source, several instruction sets: the loader picks the widest one this processor has.
#if defined(PATCHREG_X86) && defined(__linux__) && !defined(__clang__)
#define PATCHREG_CLONES __attribute__((unused, target_clones("avx512f", "avx2", "default")))
#else
#define PATCHREG_CLONES [[maybe_unused]]
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
inline int64_t widen_f16c(float*, const Half*, int64_t) { return 0; }
inline int64_t narrow_f16c(Half*, const float*, int64_t) { return 0; }
#endif

inline void widen(float* out, const Half* in, int64_t n) {
  for (int64_t i = kHasF16c ? widen_f16c(out, in, n) : 0; i < n; ++i) out[i] = in[i];
}

inline void narrow(Half* out, const float* in, int64_t n) {
  for (int64_t i = kHasF16c ? narrow_f16c(out, in, n) : 0; i < n; ++i) out[i] = in[i];
}

inline void line_sum(float* sum, const Half* source, int64_t tokens, int64_t stride, int64_t n) {
  float wide[kChunk];
  for (int64_t k = 0; k < tokens; ++k) {
    widen(wide, source + k * stride, n);
    line_sum(sum, wide, 1, 0, n);
  }
}

inline void scale_into(Half* out, const float* sum, float scale, int64_t n) {
  float wide[kChunk];
  scale_into(wide, sum, scale, n);
  narrow(out, wide, n);
}

inline void scaled_sum(float* sum, const Half* source, float scale, int64_t n) {
  float wide[kChunk];
  widen(wide, source, n);
  scaled_sum(sum, wide, scale, n);
}

inline void sum_of_two(Half* out, const Half* a, const Half* b, int64_t n) {
  float left[kChunk], right[kChunk];
  for (int64_t from = 0; from < n; from += kChunk) {
    const int64_t count = std::min(kChunk, n - from);
    widen(left, a + from, count);
    widen(right, b + from, count);
    sum_of_two(left, left, right, count);
    narrow(out + from, left, count);
  }
}

inline float dot_of(const float* a, const Half* b, int64_t n) {
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
inline void stream(void* out, const void* in, int64_t bytes) {
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

inline void finish_stream() {
#if defined(PATCHREG_X86)
  _mm_sfence();
#endif
}

inline bool may_stream(const Tensor& out, int64_t row_bytes) {
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

inline int64_t rows_per_task(int64_t channels) { return std::max<int64_t>(1, 32768 / (channels + 1)); }

template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(tensor->contiguous()) : std::nullopt;
}

#define PATCHREG_DISPATCH(TENSOR, NAME, ...)                                              \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), NAME, \
                                  __VA_ARGS__)

}  // namespace
}  // namespace patchreg
