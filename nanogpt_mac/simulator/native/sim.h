// The simulated MPS device: what its source files share.
//
// A tensor of the simulated device lives in host memory. Every operator that MPS has natively is registered for the
// MPS dispatch key with one boxed functor (redirect.cpp) that wraps the same memory as CPU tensors and calls the CPU
// kernel. None of this is a stable interface of PyTorch, so the extension is built anew for each torch version.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/version.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sim {

using at::Tensor;
using torch::jit::Stack;

const c10::Device kDevice(c10::DeviceType::MPS, 0);

inline bool on_device(const Tensor& t) {
  return t.defined() && t.device().type() == c10::DeviceType::MPS;
}

// ---- device.cpp: memory and random numbers

c10::Allocator* allocator();
// Takes a storage that a CPU kernel made as memory of the device, without a copy.
c10::DataPtr adopt(c10::Storage cpu);
void set_max_memory(int64_t bytes);
// The CPU generator that stands behind an MPS generator.
at::Generator& cpu_engine(const at::Generator& mps);
const at::Generator& default_generator();
// Makes PyTorch ask this device's hooks. It refuses a process with two accelerators, so CUDA, in a CUDA build, is
// hidden: a Mac has none either.
void take_over_hooks();

// ---- timeline.cpp: the queue that runs behind the host

namespace timeline {
int64_t now();
// Device nanoseconds for a kernel over so many bytes and floating point operations under the plan in force.
int64_t cost(int64_t bytes, int64_t flops);
bool planned();
void set_plan(double us_per_kernel, double us_per_megabyte, double us_per_gigaflop);
// Appends work of so many nanoseconds to the queue; the host does not wait.
void enqueue(int64_t nanoseconds);
// The moment at which everything enqueued so far will be done, at the earliest now.
int64_t done_at();
void wait_until(int64_t moment);
// Host waits for the whole queue.
void synchronize();
struct Counts {
  std::atomic<int64_t> kernels{0}, device_ns{0}, waits{0}, waited_ns{0};
};
Counts& counts();
} // namespace timeline

// ---- redirect.cpp: one operator that MPS has

enum Flags {
  kNoDeviceCheck = 1, // torchgen's device_check: NoCheck
  kMixedDevices = 2, // takes CPU and MPS tensors together
};

struct Op {
  Op(c10::OperatorHandle handle, int64_t flags);

  const c10::OperatorHandle handle;
  const int64_t flags;
  std::string checked_as; // the name that PyTorch's device check prints
  std::vector<bool> writes, generator; // per argument
  bool view = false; // no work on the device
  bool waits = false; // the host needs the values: .item(), nonzero, ...
  bool copies = false; // aten::copy_
  bool indexes = false; // aten::index and the like: the second argument may be a mask
  bool seeded = false; // may draw from the default generator without an argument for it
  enum class Flops { kNone, kMatmul, kLinear, kLinearBackward, kAttention } flops = Flops::kNone;
  // Computes on CPU tensors in place of the CPU kernel, for operators that only MPS has.
  c10::KernelFunction body;

  std::atomic<int64_t> calls{0};
  // Planted faults.
  std::atomic<bool> hidden_copy{false};
  std::atomic<bool> announced{false}; // the hidden copy says so in a warning of its own
  std::atomic<bool> refuses_dtype{false}, refuses_shape{false};
  std::atomic<int64_t> slow_ns{0};
  std::atomic<double> factor{1.0};
};

// Runs the operator for the device; `stack` holds its arguments and receives its results.
void run_native(Op& op, Stack* stack);
// A CPU tensor over the same memory.
Tensor cpu_alias(const Tensor& t);
[[noreturn]] void refuse_float64();
[[noreturn]] void refuse_shape();

// ---- kernels.cpp: kernels that need the device's storage, and operators that only MPS has

struct OwnKernel {
  const char* name;
  c10::KernelFunction kernel;
};
std::vector<OwnKernel> storage_kernels(); // registered as they are
std::vector<OwnKernel> cpu_bodies(); // run through run_native on CPU tensors
std::vector<OwnKernel> autograd_kernels(); // registered for AutogradMPS and for MPS

} // namespace sim
