// Runs an operator of the device on the CPU kernel, over the same memory.
//
// Inputs become CPU tensors that share the device tensors' storage; results map back by the identity of their
// storage. So views, in-place operators and out= arguments need no code of their own.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/ops/mul.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <optional>
#include <unordered_map>

namespace sim {
namespace {

constexpr const char* kOnlyStrided = "only strided tensors are supported on the simulated MPS device";

// Same geometry and bits as `t`, other storage and dispatch key.
Tensor twin(const Tensor& t, c10::Storage storage, c10::DispatchKey key) {
  auto r = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  auto* impl = r.unsafeGetTensorImpl();
  impl->set_storage_offset(0);
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  impl->_set_conj(t.is_conj());
  impl->_set_neg(t.is_neg());
  if (t._is_zerotensor())
    impl->_set_zero(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    impl->set_wrapped_number(true);
  return r;
}

// The translation of one call: device tensors to CPU tensors on the way in, back on the way out.
class Translation {
 public:
  Tensor to_cpu(const Tensor& t, bool written) {
    if (!t.defined())
      return t;
    if (!on_device(t)) {
      cpu_inputs.push_back(t);
      return t;
    }
    TORCH_CHECK(t.layout() == at::kStrided, kOnlyStrided);
    for (auto& p : pairs) {
      if (p.device.is_same(t)) {
        p.written |= written;
        return p.cpu;
      }
    }
    Tensor c = twin(t, cpu_storage(t.storage()), c10::DispatchKey::CPU);
    pairs.push_back({t, c, written});
    return c;
  }

  // After the kernel: a written tensor may have been resized, restrided, or given new memory.
  void write_back() {
    for (auto& p : pairs) {
      if (!p.written)
        continue;
      const auto& cpu = p.cpu.storage();
      auto device = p.device.storage();
      if (from_cpu.count(cpu.unsafeGetStorageImpl()) &&
          (cpu.nbytes() != device.nbytes() || cpu.data() != device.data())) {
        device.set_data_ptr_noswap(adopt(cpu));
        device.set_nbytes(cpu.nbytes());
      }
      auto* impl = p.device.unsafeGetTensorImpl();
      if (impl->sizes() != p.cpu.sizes() || impl->strides() != p.cpu.strides() ||
          impl->storage_offset() != p.cpu.storage_offset())
        impl->set_sizes_and_strides(p.cpu.sizes(), p.cpu.strides(), p.cpu.storage_offset());
    }
  }

  Tensor to_device(const Tensor& c) {
    if (!c.defined() || on_device(c))
      return c;
    for (auto& p : pairs)
      if (p.cpu.is_same(c))
        return p.device;
    for (auto& t : cpu_inputs)
      if (t.is_same(c) || (t.has_storage() && t.storage().is_alias_of(c.storage())))
        return c;
    TORCH_CHECK(c.layout() == at::kStrided, kOnlyStrided);
    if (c.scalar_type() == at::kDouble || c.scalar_type() == at::kComplexDouble)
      refuse_float64();
    auto& device = from_cpu[c.storage().unsafeGetStorageImpl()];
    if (!device)
      device = c10::Storage(
          c10::Storage::use_byte_size_t(), c.storage().nbytes(), adopt(c.storage()), allocator(), /*resizable=*/true);
    return twin(c, device, c10::DispatchKey::MPS);
  }

  bool has_device_input() const { return !pairs.empty(); }
  int64_t bytes() const {
    int64_t n = 0;
    for (auto& p : pairs)
      n += int64_t(p.device.nbytes());
    return n;
  }
  std::vector<Tensor> written() const {
    std::vector<Tensor> w;
    for (auto& p : pairs)
      if (p.written)
        w.push_back(p.cpu);
    return w;
  }

  std::vector<Tensor> cpu_inputs;

 private:
  struct Pair {
    Tensor device, cpu;
    bool written;
  };

  const c10::Storage& cpu_storage(const c10::Storage& device) {
    auto& cpu = cpu_of[device.unsafeGetStorageImpl()];
    if (!cpu) {
      auto* owner = new c10::Storage(device); // the CPU storage keeps the device's alive
      cpu = c10::Storage(c10::Storage::use_byte_size_t(), device.nbytes(),
          c10::DataPtr(device.mutable_data(), owner, [](void* s) { delete static_cast<c10::Storage*>(s); },
              c10::Device(c10::kCPU)),
          c10::GetCPUAllocator(), /*resizable=*/true);
      from_cpu[cpu.unsafeGetStorageImpl()] = device;
    }
    return cpu;
  }

  std::vector<Pair> pairs;
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of, from_cpu;
};

// Applies `f` to every tensor in an argument or a result.
template <class F>
void map_tensors(c10::IValue& v, F f) {
  if (v.isTensor()) {
    v = f(v.toTensor());
  } else if (v.isTensorList()) {
    std::vector<Tensor> out;
    for (const auto& t : v.toTensorVector())
      out.push_back(f(t));
    v = c10::List<Tensor>(out);
  } else if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const auto& t : v.toOptionalTensorVector())
      out.push_back(t.has_value() ? std::optional<Tensor>(f(*t)) : t);
    v = out;
  }
}

// The tensors that the FLOP formulas need: arguments in order, undefined and absent ones left out.
int64_t count_flops(Op::Flops kind, const Stack& stack, size_t first) {
  std::vector<Tensor> t;
  for (size_t i = first; i < stack.size(); i++)
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().dim() > 0)
      t.push_back(stack[i].toTensor());
  switch (kind) {
    case Op::Flops::kMatmul: { // ..., a [.., n, k], b [.., k, m], (out)
      for (size_t i = 0; i + 1 < t.size(); i++)
        if (t[i].dim() > 1 && t[i + 1].dim() > 1 && t[i].size(-1) == t[i + 1].size(-2))
          return 2 * t[i].numel() * t[i + 1].size(-1);
      return 0;
    }
    case Op::Flops::kLinear: // input [.., k], weight [m, k]
      return t.size() > 1 ? 2 * t[0].numel() * t[1].size(0) : 0;
    case Op::Flops::kLinearBackward: { // input [.., k], gradient [.., m], weight [m, k], which of the three are wanted
      const auto wanted = stack.back().toBoolList();
      return 2 * t[0].numel() * t[2].size(0) * (int(bool(wanted[0])) + int(bool(wanted[1])));
    }
    case Op::Flops::kAttention: // q [.., n, d], k [.., m, d]: both products
      return 4 * t[0].numel() * t[1].size(-2);
    default:
      return 0;
  }
}

// Waits as a Mac does: a copy across devices waits for the whole queue unless it is non-blocking, to the device as
// well as to the host (MPSStream::copy_and_sync). A non-blocking copy to the device of another layout blocks too.
bool copy_waits(const Stack& stack, size_t first) {
  const auto& to = stack[first].toTensor();
  const auto& from = stack[first + 1].toTensor();
  if (on_device(to) == on_device(from) || from.numel() == 0)
    return false;
  const bool non_blocking = stack[first + 2].toBool();
  return !non_blocking || (on_device(to) && to.strides() != from.strides());
}

// Indexing waits only for a mask, which becomes indices by nonzero.
bool mask_waits(const c10::IValue& indices) {
  if (indices.isOptionalTensorList())
    for (const auto& t : indices.toOptionalTensorVector())
      if (t.has_value() && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte))
        return true;
  return false;
}

std::mutex default_cpu_generator;

void call_cpu_kernel(const Op& op, Stack* stack, bool generator_given) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::RecordFunctionGuard quiet(/*is_enabled=*/false); // what the CPU kernel calls is no event of the device
  auto call = [&] {
    const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
    if (op.body.isValid())
      op.body.callBoxed(op.handle, cpu, stack);
    else
      op.handle.redispatchBoxed(cpu, stack);
  };
  if (generator_given || !op.seeded)
    return call();
  // The CPU kernel draws from the default CPU generator: lend it the device's state.
  std::lock_guard<std::mutex> lock(default_cpu_generator);
  auto cpu = at::detail::getDefaultCPUGenerator();
  auto& mine = cpu_engine(default_generator());
  const auto saved = cpu.get_state();
  cpu.set_state(mine.get_state());
  try {
    call();
  } catch (...) {
    cpu.set_state(saved);
    throw;
  }
  mine.set_state(cpu.get_state());
  cpu.set_state(saved);
}

void scale(const std::vector<Tensor>& tensors, double factor) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (auto t : tensors)
    if (t.defined() && (t.is_floating_point() || t.is_complex()) && t.device().is_cpu())
      t.mul_(factor);
}

void redirect(Op& op, Stack* stack) {
  const auto& schema = op.handle.schema();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  const int64_t flops = timeline::planned() ? count_flops(op.flops, *stack, first) : 0;
  const bool wait =
      op.indexes ? mask_waits((*stack)[first + 1]) : op.waits || (op.copies && copy_waits(*stack, first));

  Translation translation;
  std::optional<c10::Device> common;
  bool generator_given = false;
  for (size_t i = 0; i < arguments.size(); i++) {
    c10::IValue& v = (*stack)[first + i];
    if (op.generator[i]) {
      generator_given = true;
      if (v.isNone())
        v = cpu_engine(default_generator());
      else if (v.toGenerator().device().is_mps())
        v = cpu_engine(v.toGenerator());
    } else if (v.isDevice()) {
      if (v.toDevice().is_mps())
        v = c10::Device(c10::kCPU);
    } else {
      map_tensors(v, [&](const Tensor& t) {
        if (!(op.flags & (kNoDeviceCheck | kMixedDevices)))
          c10::impl::check_and_update_common_device(common, t, op.checked_as.c_str(), arguments[i].name().c_str());
        return translation.to_cpu(t, op.writes[i]);
      });
    }
  }
  if (!(op.flags & kMixedDevices) && translation.has_device_input())
    for (auto& t : translation.cpu_inputs)
      TORCH_CHECK(t.dim() == 0, "Expected all tensors to be on the same device, but found at least two devices, mps:0 and ",
          t.device(), "!");

  call_cpu_kernel(op, stack, generator_given);

  const double factor = op.factor;
  if (factor != 1.0 && !op.view && schema.returns().empty())
    scale(translation.written(), factor);
  int64_t bytes = translation.bytes();
  translation.write_back();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    map_tensors((*stack)[i], [&](const Tensor& t) {
      if (factor != 1.0 && !op.view)
        scale({t}, factor);
      const Tensor d = translation.to_device(t);
      if (d.defined() && !schema.returns()[i - (stack->size() - schema.returns().size())].alias_info())
        bytes += int64_t(d.nbytes());
      return d;
    });

  if (!op.view)
    timeline::enqueue((timeline::planned() ? timeline::cost(bytes, flops) : 0) + op.slow_ns);
  if (wait)
    timeline::synchronize();
}

// The fault of a native kernel that does its work on the CPU without a word: copies to the host, the CPU kernel,
// copies back. The copies go through the dispatcher, so they wait and a profiler sees them, as on a Mac.
void hidden_cpu_copy(Op& op, Stack* stack) {
  const auto& schema = op.handle.schema();
  const size_t first = stack->size() - schema.arguments().size();
  std::vector<std::pair<Tensor, Tensor>> pairs;
  std::vector<bool> written;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  bool generator_given = false;
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    c10::IValue& v = (*stack)[first + i];
    if (op.generator[i]) {
      generator_given = true;
      v = cpu_engine(v.isNone() ? default_generator() : v.toGenerator());
    } else if (v.isDevice()) {
      v = c10::Device(c10::kCPU);
    } else {
      map_tensors(v, [&](const Tensor& t) {
        if (!on_device(t))
          return t;
        Tensor c = t.to(at::kCPU);
        pairs.emplace_back(t, c);
        written.push_back(op.writes[i]);
        return c;
      });
    }
  }
  call_cpu_kernel(op, stack, generator_given);
  for (size_t i = 0; i < pairs.size(); i++) {
    if (!written[i])
      continue;
    if (pairs[i].first.sizes() != pairs[i].second.sizes())
      pairs[i].first.resize_(pairs[i].second.sizes());
    pairs[i].first.copy_(pairs[i].second);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    map_tensors((*stack)[i], [&](const Tensor& t) {
      for (auto& p : pairs)
        if (p.second.is_same(t))
          return p.first;
      return t.defined() ? t.to(kDevice) : t;
    });
  timeline::enqueue(op.slow_ns);
}

} // namespace

void refuse_float64() {
  TORCH_CHECK_TYPE(false,
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
      "Please use float32 instead.");
  __builtin_unreachable();
}

void refuse_shape() {
  TORCH_CHECK(false,
      "Adaptive pool MPS: input sizes must be divisible by output sizes. Non-divisible input sizes are not implemented "
      "on MPS device yet.");
  __builtin_unreachable();
}

Tensor cpu_alias(const Tensor& t) {
  Translation translation;
  return translation.to_cpu(t, false);
}

Op::Op(c10::OperatorHandle h, int64_t f) : handle(std::move(h)), flags(f) {
  const auto& schema = handle.schema();
  const auto name = schema.name().substr(6); // without "aten::"
  checked_as = "wrapper_MPS_" + schema.overload_name() + "_" + name;
  for (const auto& a : schema.arguments()) {
    writes.push_back(a.alias_info() && a.alias_info()->isWrite());
    generator.push_back(a.type()->str().find("Generator") != std::string::npos);
  }
  for (const auto& r : schema.returns())
    view |= r.alias_info() && !r.alias_info()->isWrite();
  copies = name == "copy_";
  indexes = name == "index" || name == "_index_put_impl_";
  seeded = handle.hasTag(at::Tag::nondeterministic_seeded);
  waits = handle.hasTag(at::Tag::data_dependent_output) || handle.hasTag(at::Tag::dynamic_output_shape);
  if (name == "mm" || name == "bmm" || name == "addmm" || name == "baddbmm" || name == "addbmm")
    flops = Flops::kMatmul;
  else if (name == "linear")
    flops = Flops::kLinear;
  else if (name == "linear_backward")
    flops = Flops::kLinearBackward;
  else if (name == "_scaled_dot_product_attention_math_for_mps")
    flops = Flops::kAttention;
}

void run_native(Op& op, Stack* stack) {
  op.calls++;
  if (op.refuses_dtype)
    refuse_float64();
  if (op.refuses_shape)
    refuse_shape();
  if (op.announced)
    TORCH_WARN_ONCE("MPS: this input is not supported. Falling back on CPU. This may have performance implications.");
  if (op.hidden_copy)
    hidden_cpu_copy(op, stack);
  else
    redirect(op, stack);
}

} // namespace sim
