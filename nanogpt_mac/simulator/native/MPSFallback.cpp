// Which operators MPS has, which fall back, which are missing; and what Python may ask of the device.
//
// The texts are those of aten/src/ATen/mps/MPSFallback.mm. This file has its name, because a warning carries the name
// of the file that gave it and tools look for it.
#include "sim.h"

#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_to_cpu.h>
#include <caffe2/core/common.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

namespace sim {
namespace {

std::atomic<bool> fallback_enabled{false};
std::mutex mutex;
std::map<std::string, int64_t> fallen_back, refused;
std::set<std::string> nowhere; // planted: without a CPU kernel too

void count(std::map<std::string, int64_t>& calls, const c10::OperatorHandle& op) {
  std::lock_guard<std::mutex> lock(mutex);
  calls[c10::toString(op.operator_name())]++;
}

bool runs_on_cpu(const c10::OperatorHandle& op) {
  std::lock_guard<std::mutex> lock(mutex);
  return !nowhere.count(c10::toString(op.operator_name()));
}

// What cpu_fallback does with an operator that the CPU lacks as well: copies its tensors, then the dispatcher's error.
[[noreturn]] void refuse_on_cpu(const c10::OperatorHandle& op, const Stack& stack) {
  std::vector<Tensor> tensors;
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); i++)
    if (stack[i].isTensor() && stack[i].toTensor().defined())
      tensors.push_back(stack[i].toTensor());
  at::_to_cpu(tensors);
  TORCH_CHECK_NOT_IMPLEMENTED(false, "Could not run '", op.schema().operator_name(),
      "' with arguments from the 'CPU' backend. This could be because the operator doesn't exist for this backend, or "
      "was omitted during the selective/custom build process (if using custom build).");
  __builtin_unreachable();
}

void mps_fallback(const c10::OperatorHandle& op, Stack* stack) {
  count(fallen_back, op);
  // One place for all operators, hence one warning for all of them together, unless torch.set_warn_always(True).
  TORCH_WARN_ONCE("The operator '", op.schema().operator_name(), "' is not currently supported ",
      "on the MPS backend and will fall back to run on the CPU.", " This may have performance implications.");
  if (!runs_on_cpu(op))
    refuse_on_cpu(op, *stack);
  at::native::cpu_fallback(op, stack);
}

void mps_backend_fallback(const c10::OperatorHandle& op, Stack* stack) {
  if (fallback_enabled)
    return mps_fallback(op, stack);
  count(refused, op);
  TORCH_CHECK_NOT_IMPLEMENTED(false, "The operator '", op.schema().operator_name(), "' is not currently implemented ",
      "for the MPS device. If you want this op to be considered for addition ",
      "please comment on https://github.com/pytorch/pytorch/issues/141287 and mention use-case, that resulted in "
      "missing op",
      " as well as commit hash ", caffe2::GetBuildOptions().at("COMMIT_SHA"),
      ". As a temporary fix, you can set the environment variable `PYTORCH_ENABLE_MPS_FALLBACK=1` ",
      "to use the CPU as a fallback for this op. WARNING: this will be slower than running natively ", "on MPS.");
}

struct Native final : c10::OperatorKernel {
  explicit Native(std::shared_ptr<Op> o) : op(std::move(o)) {}
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) { run_native(*op, stack); }
  std::shared_ptr<Op> op;
};

// An operator of the table and its present registration; none when it is missing.
struct Entry {
  std::shared_ptr<Op> op; // null for kernels that are no redirection
  std::optional<c10::RegistrationHandleRAII> registration;
  std::string status = "missing";
};
std::map<std::string, Entry>& table() {
  static auto* t = new std::map<std::string, Entry>; // never freed: the dispatcher outlives us
  return *t;
}

c10::OperatorName operator_name(const std::string& name) {
  const auto dot = name.find('.');
  return {"aten::" + name.substr(0, dot), dot == std::string::npos ? "" : name.substr(dot + 1)};
}

c10::RegistrationHandleRAII register_kernel(
    const std::string& name, c10::DispatchKey key, c10::KernelFunction kernel, const std::string& origin) {
  return c10::Dispatcher::singleton().registerImpl(operator_name(name), key, std::move(kernel), std::nullopt,
      /*inferred_function_schema=*/nullptr, "registered at " + origin);
}

// What a dispatch table shows as the origin; the names are those of a Mac's build.
constexpr const char* kNativeOrigin = "simulated/aten/src/ATen/RegisterMPS.cpp:1";
constexpr const char* kFallbackOrigin = "simulated/aten/src/ATen/mps/MPSFallback.mm:1";

void set_status(const std::string& name, Entry& entry, const std::string& status) {
  if (entry.status == status)
    return;
  entry.registration.reset(); // first, or the dispatcher warns that a kernel is overridden
  if (status == "native")
    entry.registration = register_kernel(name, c10::DispatchKey::MPS,
        c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<Native>(entry.op)), kNativeOrigin);
  else if (status == "fallback")
    entry.registration = register_kernel(name, c10::DispatchKey::MPS,
        c10::KernelFunction::makeFromBoxedFunction<&mps_fallback>(), kFallbackOrigin);
  entry.status = status;
}

// Registers the device's operators. Returns the names that this torch does not know or has a kernel for already.
std::vector<std::string> install(const c10::Dict<std::string, int64_t>& native,
    const std::vector<std::string>& fallback, bool enable_fallback) {
  take_over_hooks();
  fallback_enabled = enable_fallback;
  auto& dispatcher = c10::Dispatcher::singleton();
  static auto backend_fallback = dispatcher.registerFallback(c10::DispatchKey::MPS,
      c10::KernelFunction::makeFromBoxedFunction<&mps_backend_fallback>(),
      std::string("registered at ") + kFallbackOrigin);
  std::vector<std::string> skipped;
  auto find = [&](const std::string& name) {
    auto handle = dispatcher.findSchema(operator_name(name));
    if (handle && !handle->hasKernelForDispatchKey(c10::DispatchKey::MPS))
      return handle;
    skipped.push_back(name);
    return std::optional<c10::OperatorHandle>();
  };
  for (auto& own : storage_kernels()) {
    if (!find(own.name))
      continue;
    Entry& entry = table()[own.name];
    entry.registration = register_kernel(own.name, c10::DispatchKey::MPS, own.kernel, kNativeOrigin);
    entry.status = "native";
  }
  std::map<std::string, c10::KernelFunction> bodies;
  for (auto& own : cpu_bodies())
    bodies.emplace(own.name, own.kernel);
  for (const auto& item : native) {
    if (table().count(item.key()))
      continue;
    if (auto handle = find(item.key())) {
      auto op = std::make_shared<Op>(*handle, item.value());
      if (auto body = bodies.find(item.key()); body != bodies.end())
        op->body = body->second;
      Entry& entry = table()[item.key()];
      entry.op = op;
      set_status(item.key(), entry, "native");
    }
  }
  for (const auto& name : fallback)
    if (auto handle = find(name)) {
      Entry& entry = table()[name];
      entry.op = std::make_shared<Op>(*handle, 0);
      set_status(name, entry, "fallback");
    }
  static std::vector<c10::RegistrationHandleRAII> kept;
  for (auto& own : autograd_kernels())
    for (auto key : {c10::DispatchKey::AutogradMPS, c10::DispatchKey::MPS})
      kept.push_back(register_kernel(own.name, key, own.kernel, kNativeOrigin));
  return skipped;
}

Entry& redirected(const std::string& name) {
  auto found = table().find(name);
  TORCH_CHECK(found != table().end() && found->second.op, "no kernel of the simulated device can be replaced for aten::",
      name);
  return found->second;
}

std::string status(const std::string& name) {
  const auto found = table().find(name);
  return found == table().end() ? "absent" : found->second.status;
}

void plant(const std::string& name, const std::string& fault, double value) {
  Entry& entry = redirected(name);
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (fault == "nowhere")
      nowhere.insert("aten::" + name);
    else if (fault == "native")
      nowhere.erase("aten::" + name);
  }
  if (fault == "native" || fault == "fallback" || fault == "missing" || fault == "nowhere")
    set_status(name, entry, fault == "nowhere" ? "missing" : fault);
  else if (fault == "hidden")
    entry.op->hidden_copy = value != 0;
  else if (fault == "announced")
    entry.op->announced = entry.op->hidden_copy = value != 0;
  else if (fault == "dtype_limit")
    entry.op->refuses_dtype = value != 0;
  else if (fault == "shape_limit")
    entry.op->refuses_shape = value != 0;
  else if (fault == "slow")
    entry.op->slow_ns = int64_t(value * 1e6);
  else if (fault == "wrong")
    entry.op->factor = value;
  else
    TORCH_CHECK(false, "unknown fault ", fault);
}

c10::Dict<std::string, int64_t> calls(const std::string& kind) {
  c10::Dict<std::string, int64_t> out;
  if (kind == "native") {
    for (auto& [name, entry] : table())
      if (entry.op && entry.op->calls)
        out.insert("aten::" + name, entry.op->calls.load());
    return out;
  }
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& [name, n] : kind == "fallback" ? fallen_back : refused)
    out.insert(name, n);
  return out;
}

void reset_counts() {
  for (auto& [name, entry] : table())
    if (entry.op)
      entry.op->calls = 0;
  auto& c = timeline::counts();
  c.kernels = c.device_ns = c.waits = c.waited_ns = 0;
  std::lock_guard<std::mutex> lock(mutex);
  fallen_back.clear();
  refused.clear();
}

std::vector<int64_t> timeline_counts() {
  auto& c = timeline::counts();
  return {c.kernels, c.device_ns, c.waits, c.waited_ns};
}

// A kernel that is no operator, such as a Metal launch.
void enqueue(int64_t bytes, int64_t nanoseconds) {
  timeline::enqueue((timeline::planned() ? timeline::cost(bytes, 0) : 0) + nanoseconds);
}

void storage_resize(const Tensor& t, int64_t bytes) {
  at::native::resize_bytes_cpu(t.storage().unsafeGetStorageImpl(), size_t(bytes));
}

Tensor alias(const Tensor& t) {
  return cpu_alias(t);
}

} // namespace

// The interface for Python is a set of operators, not a Python module: so neither Python's headers nor pybind11 are
// needed, and one build serves every Python.
TORCH_LIBRARY(nanogpt_mps, m) {
  m.def("install", &install);
  m.def("status", &status);
  m.def("plant", &plant);
  m.def("calls", &calls);
  m.def("reset_counts", &reset_counts);
  m.def("timeline_counts", &timeline_counts);
  m.def("set_plan", &timeline::set_plan);
  m.def("enqueue", &enqueue);
  m.def("synchronize", &timeline::synchronize);
  m.def("cpu_alias", &alias);
  m.def("storage_resize", &storage_resize);
  m.def("set_max_memory", &set_max_memory);
}

} // namespace sim
