// Shape checks shared by the CPU and the CUDA kernels of fused.cpp and fused.cu.
#pragma once

#include "common.h"

namespace patchreg {

// Layer norm over the channels, with one weight and one bias for each.
inline void check_norm(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& like,
                       int64_t channels) {
  TORCH_CHECK_VALUE(channels >= 1, "a layer norm needs channels, got ", like.sizes());
  check_like(weight, like, {channels});
  check_like(bias, like, {channels});
}

inline void check_owner(const at::Tensor& owner, const at::Tensor& x, const Grid& grid) {
  TORCH_CHECK_TYPE(owner.scalar_type() == at::kLong, "owner is ", owner.scalar_type(),
                   "; expected int64");
  const int64_t tokens = grid.tokens();
  TORCH_CHECK_VALUE(owner.dim() == 2 && owner.size(0) == x.size(0) && owner.size(1) == tokens,
                    "expected owner [", x.size(0), ", ", tokens, "], got ", owner.sizes());
  TORCH_CHECK_VALUE(owner.device() == x.device(), "owner is on ", owner.device(),
                    ", the tokens on ", x.device());
}

// Region means of half precision stay in float32, as the router reads them.
inline at::ScalarType mean_type(const at::Tensor& x) {
  return x.element_size() < 4 ? at::kFloat : x.scalar_type();
}

inline void check_region(int64_t region) {
  TORCH_CHECK_VALUE(region >= 1 && region <= 32768, "region is ", region,
                    "; expected 1..32768 tokens per side");
}

}  // namespace patchreg
