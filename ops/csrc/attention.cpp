// Attention of packed queries on the CPU: every image has its own number of queries and all of its keys.
// A tile of keys stays in the L1 cache while a block of queries looks at it; sums stay in registers.
#include "cpu_rows.h"

#include <cmath>
#include <cstring>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#if defined(__GNUC__) && !defined(__clang__)
// Products are summed in one rounding; nothing here has to equal another order of operations.
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"
#define PATCHREG_ATTENTION 1
#endif

namespace patchreg {
namespace {

#if defined(PATCHREG_ATTENTION)
constexpr int64_t kWide = 16;   // floats of one wide register
constexpr int64_t kLines = 6;    // queries whose sums are held in registers
constexpr int64_t kQueries = 24;  // queries that share what lies in the L1 cache
constexpr int64_t kTile = 64;   // keys of a tile

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

PATCHREG_INLINE Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, 64);
  return value;
}

PATCHREG_INLINE void keep(float* to, Floats value) { __builtin_memcpy(to, &value, 64); }

// out = left x right (+ out): kLines lines of kVectors wide registers, over `inner`.
template <int kVectors, bool kAdd>
PATCHREG_INLINE void product(float* out, int64_t out_step, const float* left, int64_t left_step,
                             const float* right, int64_t right_step, int64_t inner) {
  Floats sum[kLines][kVectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kAdd ? load(out + r * out_step + v * kWide) : Floats{};
    }
  }
  for (int64_t c = 0; c < inner; ++c) {
    Floats line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load(right + c * right_step + v * kWide);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kLines; ++r) {
      const Floats factor = left[r * left_step + c] - Floats{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * line[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kLines; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) keep(out + r * out_step + v * kWide, sum[r][v]);
  }
}

template <bool kAdd>
PATCHREG_INLINE void lines(float* out, int64_t out_step, const float* left, int64_t left_step,
                           const float* right, int64_t right_step, int64_t inner, int64_t width) {
  int64_t at = 0;
  for (; at + 4 * kWide <= width; at += 4 * kWide) {
    product<4, kAdd>(out + at, out_step, left, left_step, right + at, right_step, inner);
  }
  if (at + 2 * kWide <= width) {
    product<2, kAdd>(out + at, out_step, left, left_step, right + at, right_step, inner);
    at += 2 * kWide;
  }
  if (at < width) product<1, kAdd>(out + at, out_step, left, left_step, right + at, right_step, inner);
}

// e^x of values that are not positive, to 2 ulp; below -87 it is e^-87. NaN stays NaN.
PATCHREG_INLINE Floats exponential(Floats x) {
  const Floats low = -87.0f - Floats{};
  x = x < low ? low : x;
  const Floats magic = 12582912.0f - Floats{};  // Its last bits count whole numbers.
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
  return y * (Floats)power;
}

// Turns the scores of one query into weights; returns one over their sum.
PATCHREG_INLINE float softmax(float* score, int64_t keys, int64_t padded) {
  for (int64_t j = keys; j < padded; ++j) score[j] = -INFINITY;
  Floats high = load(score);
  for (int64_t j = kWide; j < padded; j += kWide) {
    const Floats value = load(score + j);
    high = value > high ? value : high;
  }
  float top = high[0];
  for (int64_t j = 1; j < kWide; ++j) top = high[j] > top ? high[j] : top;
  Floats sum = {};
  for (int64_t j = 0; j < padded; j += kWide) {
    const Floats value = exponential(load(score + j) - top);
    keep(score + j, value);
    sum += value;
  }
  float total = 0;
  for (int64_t j = 0; j < kWide; ++j) total += sum[j];
  return 1 / total;
}

// 16 lines of 16 floats each become columns.
PATCHREG_INLINE void flip(Floats* line) {
#define PATCHREG_SWAP(step, one, two)                          \
  for (int i = 0; i < 16; ++i) {                               \
    if ((i & step) == 0) {                                     \
      const Floats a = line[i], b = line[i + step];            \
      line[i] = __builtin_shuffle(a, b, one);                  \
      line[i + step] = __builtin_shuffle(a, b, two);           \
    }                                                          \
  }
  const Ints a1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  const Ints b1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  const Ints a2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Ints b2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  const Ints a4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  const Ints b4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
  const Ints a8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const Ints b8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
#pragma GCC unroll 16
  PATCHREG_SWAP(1, a1, b1)
#pragma GCC unroll 16
  PATCHREG_SWAP(2, a2, b2)
#pragma GCC unroll 16
  PATCHREG_SWAP(4, a4, b4)
#pragma GCC unroll 16
  PATCHREG_SWAP(8, a8, b8)
#undef PATCHREG_SWAP
}

// Working memory of a thread.
struct Desk {
  int64_t keys, width, padded;
  std::vector<float> turned, values, query, score, out;

  Desk(int64_t keys, int64_t width)
      : keys(keys),
        width(width),
        padded((keys + kWide - 1) / kWide * kWide),
        turned(padded * width),
        values(keys * width),
        query(kQueries * width),
        score(kQueries * padded),
        out(kQueries * width) {}
};

// Rows of one head, `step` floats apart.
struct Rows {
  const float* data;
  int64_t step;
};

// All queries of one head of one image; `width` is a multiple of 16.
PATCHREG_CLONES void attend_head(float* out, int64_t out_step, Rows query, int64_t count, Rows key,
                                 Rows value, float scale, Desk& desk) {
  const int64_t keys = desk.keys, width = desk.width, padded = desk.padded;
  for (int64_t j = 0; j < padded; j += kWide) {
    for (int64_t c = 0; c < width; c += kWide) {
      Floats line[kWide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWide; ++i) {
        line[i] = load(key.data + std::min(j + i, keys - 1) * key.step + c);
      }
      flip(line);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWide; ++i) keep(desk.turned.data() + (c + i) * padded + j, line[i]);
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    std::memcpy(desk.values.data() + j * width, value.data + j * value.step, width * sizeof(float));
  }
  float *asked = desk.query.data(), *score = desk.score.data(), *sum = desk.out.data();
  for (int64_t first = 0; first < count; first += kQueries) {
    const int64_t rows = std::min(kQueries, count - first);
    for (int64_t r = 0; r < kQueries; ++r) {
      const float* from = query.data + (first + std::min(r, rows - 1)) * query.step;
      for (int64_t c = 0; c < width; ++c) asked[r * width + c] = from[c] * scale;
    }
    for (int64_t j = 0; j < padded; j += kTile) {
      const int64_t tile = std::min(kTile, padded - j);
      for (int64_t r = 0; r < rows; r += kLines) {
        lines<false>(score + r * padded + j, padded, asked + r * width, width,
                     desk.turned.data() + j, padded, width, tile);
      }
    }
    float share[kQueries];
    for (int64_t r = 0; r < rows; ++r) share[r] = softmax(score + r * padded, keys, padded);
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t tile = std::min(kTile, keys - j);
      for (int64_t r = 0; r < rows; r += kLines) {
        const float* weight = score + r * padded + j;
        const float* part = desk.values.data() + j * width;
        if (j) {
          lines<true>(sum + r * width, width, weight, padded, part, width, tile, width);
        } else {
          lines<false>(sum + r * width, width, weight, padded, part, width, tile, width);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + (first + r) * out_step;
      for (int64_t c = 0; c < width; ++c) to[c] = sum[r * width + c] * share[r];
    }
  }
}

#endif

void check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& starts) {
  TORCH_CHECK_VALUE(query.dim() == 3 && key.dim() == 4, "expected query [L, h, d] and key [B, h, M, d], got ",
                    query.sizes(), " and ", key.sizes());
  TORCH_CHECK_VALUE(key.sizes() == value.sizes() && key.size(1) == query.size(1) &&
                        key.size(3) == query.size(2),
                    "query ", query.sizes(), ", key ", key.sizes(), " and value ", value.sizes(),
                    " do not fit together");
  TORCH_CHECK_VALUE(key.size(2) >= 1 && key.size(3) >= 1, "key ", key.sizes(),
                    " has no keys or no channels");
  TORCH_CHECK_TYPE(key.scalar_type() == query.scalar_type() &&
                       value.scalar_type() == query.scalar_type(),
                   "query, key and value differ in type");
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kInt, "starts is ", starts.scalar_type(),
                   "; expected int32");
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.size(0) == key.size(0) + 1, "expected starts [",
                    key.size(0) + 1, "], got ", starts.sizes());
  TORCH_CHECK_VALUE(starts.is_cpu(), "starts is on ", starts.device(), "; expected the CPU");
}

// First row of every image, checked: memory stays safe.
std::vector<int64_t> checked_starts(const Tensor& starts, int64_t rows) {
  const Tensor lying = starts.contiguous();
  const int32_t* from = lying.const_data_ptr<int32_t>();
  std::vector<int64_t> found(from, from + lying.numel());
  TORCH_CHECK_INDEX(found.front() == 0 && found.back() == rows, "starts goes from ", found.front(),
                    " to ", found.back(), "; expected 0 to ", rows, ", the rows of query");
  for (size_t i = 1; i < found.size(); ++i) {
    TORCH_CHECK_INDEX(found[i] >= found[i - 1], "starts falls at image ", i - 1);
  }
  return found;
}

// Any type and width, one call of the library for each image.
Tensor attend_by_image(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::vector<int64_t>& start, double scale) {
  std::vector<Tensor> parts;
  for (int64_t b = 0; b < key.size(0); ++b) {
    const Tensor part = query.slice(0, start[b], start[b + 1]).transpose(0, 1).unsqueeze(0);
    const Tensor seen = at::scaled_dot_product_attention(part, key.slice(0, b, b + 1),
                                                         value.slice(0, b, b + 1), std::nullopt,
                                                         0.0, false, scale);
    parts.push_back(seen.squeeze(0).transpose(0, 1).flatten(1));
  }
  return parts.empty() ? at::empty({0, query.size(1) * query.size(2)}, query.options())
                       : at::cat(parts);
}

Tensor packed_attend(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& starts, double scale) {
  check_attention(query, key, value, starts);
  const int64_t batch = key.size(0), heads = key.size(1), keys = key.size(2), width = key.size(3);
  const std::vector<int64_t> start = checked_starts(starts, query.size(0));
#if defined(PATCHREG_ATTENTION)
  const bool rows = query.stride(2) == 1 && key.stride(3) == 1 && value.stride(3) == 1;
  if (query.scalar_type() == at::kFloat && width % kWide == 0 && rows) {
    const Tensor out = at::empty({query.size(0), heads * width}, query.options());
    float* const target = out.mutable_data_ptr<float>();
    const float* const asked = query.const_data_ptr<float>();
    const float* const held = key.const_data_ptr<float>();
    const float* const told = value.const_data_ptr<float>();
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      Desk desk(keys, width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / heads, h = task % heads, count = start[b + 1] - start[b];
        if (count == 0) continue;
        attend_head(target + start[b] * heads * width + h * width, heads * width,
                    Rows{asked + start[b] * query.stride(0) + h * query.stride(1), query.stride(0)},
                    count, Rows{held + b * key.stride(0) + h * key.stride(1), key.stride(2)},
                    Rows{told + b * value.stride(0) + h * value.stride(1), value.stride(2)},
                    static_cast<float>(scale), desk);
      }
    });
    return out;
  }
#endif
  return attend_by_image(query, key, value, start, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(patchreg, CPU, m) { m.impl("packed_attend", &packed_attend); }

}  // namespace patchreg
