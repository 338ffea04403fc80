// Kernels that cannot be a redirection: those that need the device's own storage, those that only MPS has, and the
// rules inside composite kernels that a build without MPS compiles out.
#include "sim.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_fused_rms_norm.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_attention_math_for_mps.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/where.h>

#include <limits>
#include <type_traits>

namespace sim {
namespace {

using at::IntArrayRef;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// ---------------------------------------------------------------- memory of the device

at::ScalarType checked_dtype(std::optional<at::ScalarType> dtype) {
  const auto d = c10::dtype_or_default(dtype);
  if (d == at::kDouble || d == at::kComplexDouble)
    refuse_float64();
  return d;
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      c10::layout_or_default(layout) == at::kStrided, "only strided tensors are supported on MPS");
  TORCH_CHECK(size.size() <= 16, "MPS supports tensors with dimensions <= 16, but got ", size.size(), ".");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(),
      c10::DispatchKeySet(c10::DispatchKey::MPS), checked_dtype(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(),
      c10::DispatchKeySet(c10::DispatchKey::MPS), checked_dtype(dtype));
}

Tensor efficient_zero(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  static at::native::ZeroTensorAllocator nothing(kDevice);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &nothing,
      c10::DispatchKeySet(c10::DispatchKey::MPS) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor),
      c10::dtype_or_default(dtype), std::nullopt);
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor destination = to;
  destination.copy_(self, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes())
    at::native::resize_(to, self.sizes(), std::nullopt);
  return copy_from(self, to, false);
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(
    Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.guard_int(__FILE__, __LINE__),
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const auto n = int64_t(source.nbytes() / self.element_size());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {n}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  if (self.is_same(source))
    return self;
  return at::native::set_storage_cpu_(
      self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(), true);
  return at::native::set_storage_cpu_(self, std::move(none), 0, {0}, {});
}

// MPSFallback.mm registers this only to refuse it.
Tensor slow_conv2d_forward(const Tensor& self, const Tensor& weight, c10::SymIntArrayRef, const OptionalTensor&,
    c10::SymIntArrayRef, c10::SymIntArrayRef) {
  TORCH_CHECK(self.device() == weight.device(), "slow_conv2d_forward_mps: input(device='", self.device(),
      "') and weight(device=", weight.device(), "')  must be on the same device");
  TORCH_INTERNAL_ASSERT(false, "slow_conv2d_forward_mps should not be called for both tensors on MPS device");
}

// ---------------------------------------------------------------- operators that only MPS has, over CPU tensors

std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& self, const Tensor& gradient, const Tensor& weight, std::array<bool, 3> wanted) {
  const Tensor rows = gradient.reshape({-1, gradient.size(-1)});
  Tensor d_input, d_weight, d_bias;
  if (wanted[0])
    d_input = rows.mm(weight).reshape(self.sizes());
  if (wanted[1])
    d_weight = rows.t().mm(self.reshape({-1, self.size(-1)}));
  if (wanted[2])
    d_bias = rows.sum(0);
  return {d_input, d_weight, d_bias};
}

Tensor max_pool2d_backward(const Tensor& gradient, const Tensor& self, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto indices = std::get<1>(at::max_pool2d_with_indices(self, kernel, stride, padding, dilation, ceil_mode));
  return at::max_pool2d_with_indices_backward(
      gradient, self, kernel, stride.empty() ? kernel : stride, padding, dilation, ceil_mode, indices);
}

Pair attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double dropout,
    bool causal, const OptionalTensor& dropout_mask, std::optional<double> scale, bool gqa) {
  return at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, dropout_mask, scale, gqa);
}

// The operator took no enable_gqa before 2.12 or so.
constexpr bool kTakesGqa =
    std::is_invocable_v<decltype(&at::_scaled_dot_product_attention_math_for_mps), const Tensor&, const Tensor&,
        const Tensor&, const OptionalTensor&, double, bool, const OptionalTensor&, std::optional<double>, bool>;

Pair attention_without_gqa(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
    double dropout, bool causal, const OptionalTensor& dropout_mask, std::optional<double> scale) {
  return attention(q, k, v, mask, dropout, causal, dropout_mask, scale, false);
}

template <class... Arguments>
Pair call_attention_for_mps(bool gqa, Arguments... arguments) {
  if constexpr (kTakesGqa)
    return at::_scaled_dot_product_attention_math_for_mps(arguments..., gqa);
  else
    return at::_scaled_dot_product_attention_math_for_mps(arguments...);
}

// ---------------------------------------------------------------- rules that a build without MPS compiles out

// Stock scaled_dot_product_attention asks a DispatchStub about MPS, which aborts in a build without MPS. This is what
// it does on a Mac: the fused kernel only without dropout and where no gradient is needed, else plain math.
Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& attn_mask,
    double dropout, bool causal, std::optional<double> scale, bool gqa) {
  auto mask = attn_mask;
  if (mask && mask->defined() && mask->scalar_type() == at::kBool)
    mask = at::where(*mask, 0.0,
        at::scalar_tensor(-std::numeric_limits<double>::infinity(), q.options().device(mask->device())));
  const bool gradient =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  const bool heads_match = kTakesGqa || !gqa;
  if (on_device(q) && dropout == 0.0 && !gradient && heads_match)
    return std::get<0>(
        call_attention_for_mps<Tensor, Tensor, Tensor, OptionalTensor, double, bool, OptionalTensor,
            std::optional<double>>(gqa, q, k, v, mask, dropout, causal, std::nullopt, scale));
  return std::get<0>(
      at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, std::nullopt, scale, gqa));
}

// The same of rms_norm: fused only where no gradient is needed (its backward is missing), else composed.
Tensor rms_norm(
    const Tensor& input, c10::SymIntArrayRef shape, const OptionalTensor& weight, std::optional<double> eps) {
  const bool gradient = at::GradMode::is_enabled() &&
      (input.requires_grad() || (weight && weight->defined() && weight->requires_grad()));
  const bool weighted = weight && weight->defined();
  if (on_device(input) && weighted && !gradient)
    return std::get<0>(at::_fused_rms_norm(input, C10_AS_INTARRAYREF_SLOW(shape), weight, eps));
  std::vector<int64_t> dimensions;
  for (size_t i = 0; i < shape.size(); i++)
    dimensions.push_back(-int64_t(i) - 1);
  const bool narrow = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  const Tensor wide = narrow ? input.to(at::kFloat) : input;
  const double smallest = eps.value_or(std::numeric_limits<float>::epsilon());
  const Tensor scale = wide.pow(2).mean(dimensions, /*keepdim=*/true).add(smallest).rsqrt();
  const Tensor normalized = wide.mul(scale).type_as(input);
  return weighted ? normalized.mul(*weight) : normalized;
}

template <class F>
c10::KernelFunction kernel(F* f) {
  return c10::KernelFunction::makeFromUnboxedRuntimeFunction(f);
}

} // namespace

std::vector<OwnKernel> storage_kernels() {
  return {
      {"empty.memory_format", kernel(&empty)},
      {"empty_strided", kernel(&empty_strided)},
      {"_efficientzerotensor", kernel(&efficient_zero)},
      {"_copy_from", kernel(&copy_from)},
      {"_copy_from_and_resize", kernel(&copy_from_and_resize)},
      {"resize_", kernel(&resize)},
      {"set_.source_Storage_storage_offset", kernel(&set_storage)},
      {"set_.source_Storage", kernel(&set_whole_storage)},
      {"set_.source_Tensor", kernel(&set_tensor)},
      {"set_", kernel(&set_nothing)},
      {"_slow_conv2d_forward", kernel(&slow_conv2d_forward)},
  };
}

std::vector<OwnKernel> cpu_bodies() {
  std::vector<OwnKernel> bodies{
      {"linear_backward", kernel(&linear_backward)},
      {"max_pool2d_backward", kernel(&max_pool2d_backward)},
  };
  if constexpr (kTakesGqa)
    bodies.push_back({"_scaled_dot_product_attention_math_for_mps", kernel(&attention)});
  else
    bodies.push_back({"_scaled_dot_product_attention_math_for_mps", kernel(&attention_without_gqa)});
  return bodies;
}

std::vector<OwnKernel> autograd_kernels() {
  return {
      {"scaled_dot_product_attention", kernel(&scaled_dot_product_attention)},
      {"rms_norm", kernel(&rms_norm)},
  };
}

} // namespace sim
