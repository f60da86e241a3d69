// Rows of channels on CUDA: 16-byte packs of channels, sums of a block, launch shapes.
#pragma once

#include "common.h"

#include <algorithm>
#include <optional>
#include <type_traits>

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace patchreg {
namespace {

using at::Tensor;

constexpr int kThreads = 256;  // per block, a power of two

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `kWidth` neighbouring channels of one row, loaded and stored at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};

template <typename T, int kWidth>
__device__ __forceinline__ void add(Sum<T> (&sum)[kWidth], const Pack<T, kWidth>& pack,
                                    Sum<T> scale) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += static_cast<Sum<T>>(pack.value[i]) * scale;
}

template <typename T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> rounded(const Sum<T> (&sum)[kWidth], Sum<T> scale) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) pack.value[i] = static_cast<T>(sum[i] * scale);
  return pack;
}

template <typename T, int kWidth>
__device__ __forceinline__ void add_square(Sum<T> (&sum)[kWidth], const Pack<T, kWidth>* image,
                                           const Square& square, int32_t width, int32_t packs,
                                           int32_t pack) {
  for (int32_t line = 0; line < square.lines; ++line) {
    const Pack<T, kWidth>* token =
        image + static_cast<int64_t>(square.token + line * width) * packs + pack;
#pragma unroll 4
    for (int32_t column = 0; column < square.columns; ++column) {
      add<T, kWidth>(sum, token[static_cast<int64_t>(column) * packs], Sum<T>(1));
    }
  }
}

// Sum over the block in a fixed order; every thread gets the result.
template <typename V>
__device__ V block_sum(V value, V* shared) {
  const int thread = threadIdx.x + threadIdx.y * blockDim.x;
  __syncthreads();
  shared[thread] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  return shared[0];
}

// ---- launches ----

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

// Blocks of kThreads (or fewer) threads: channels along x, rows along y.
struct Launch {
  dim3 block;
  int64_t blocks;
  cudaStream_t stream;
};

inline Launch launch_rows(int64_t rows, int64_t packs) {
  const int64_t across = std::clamp<int64_t>(packs, 1, kThreads);
  const int64_t down = std::max<int64_t>(1, kThreads / across);
  const int64_t blocks = (rows + down - 1) / down;
  TORCH_CHECK_VALUE(blocks <= INT32_MAX, "the batch has too many rows for one launch: ", rows);
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), blocks,
          c10::cuda::getCurrentCUDAStream()};
}

inline bool fits_packs(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Calls `body(T{}, width)` with 16-byte packs where channels and addresses allow, else single values.
template <typename T, typename Body>
void with_width(int64_t channels, std::initializer_list<const void*> addresses, Body&& body) {
  constexpr int kWidth = 16 / sizeof(T);
  TORCH_CHECK_VALUE(channels <= INT32_MAX, "too many channels: ", channels);
  if (channels % kWidth == 0 && std::all_of(addresses.begin(), addresses.end(), fits_packs)) {
    body(std::integral_constant<int, kWidth>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

template <typename T, int kWidth>
const Pack<T, kWidth>* packs_of(const T* values) {
  return reinterpret_cast<const Pack<T, kWidth>*>(values);
}

template <typename T, int kWidth>
Pack<T, kWidth>* packs_of(T* values) {
  return reinterpret_cast<Pack<T, kWidth>*>(values);
}

#define PATCHREG_DISPATCH(TENSOR, NAME, ...)                                                     \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), NAME,        \
                                  __VA_ARGS__)

inline unsigned image_blocks(int64_t count) {
  TORCH_CHECK_VALUE(count <= INT32_MAX, "too many blocks for one launch: ", count);
  return static_cast<unsigned>(count);
}

}  // namespace
}  // namespace patchreg
