// What PyTorch asks of a device: an allocator, a guard, a generator and the MPS hooks.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <map>
#include <mutex>

namespace sim {
namespace {

// ---------------------------------------------------------------- memory

std::atomic<int64_t> allocated{0}, peak{0};
std::atomic<int64_t> max_memory{int64_t(16) << 30};
std::atomic<double> watermark{1.7}; // MPSAllocator's default high watermark ratio

struct Block { // one allocation: plain memory, or a storage that a CPU kernel made
  void* memory = nullptr;
  int64_t bytes = 0;
  c10::Storage cpu;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->bytes;
  if (block->memory)
    c10::free_cpu(block->memory);
  delete block;
}

void reserve(int64_t bytes) {
  const double limit = double(max_memory) * watermark;
  TORCH_CHECK(watermark <= 0 || double(allocated) + double(bytes) <= limit,
      "MPS backend out of memory (MPS allocated: ", allocated.load(), " bytes, other allocations: 0 bytes, max allowed: ",
      int64_t(limit), " bytes). Tried to allocate ", bytes,
      " bytes on shared pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations "
      "(may cause system failure).");
  const int64_t total = allocated += bytes;
  int64_t before = peak;
  while (total > before && !peak.compare_exchange_weak(before, total)) {
  }
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0)
      return {nullptr, nullptr, &free_block, kDevice};
    reserve(int64_t(bytes));
    auto* block = new Block{c10::alloc_cpu(bytes), int64_t(bytes), {}};
    return {block->memory, block, &free_block, kDevice};
  }
  // The context is not the memory itself, so there is no raw deleter.
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { peak = allocated.load(); }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = allocated;
    stats.allocated_bytes[0].peak = peak;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak = allocated.load(); }
};
Allocator device_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::MPS, &device_allocator);

// ---------------------------------------------------------------- events

struct Event {
  bool timing = false;
  bool recorded = false;
  int64_t moment = 0;
};

void record(Event& e) {
  e.recorded = true;
  e.moment = timeline::done_at();
}

// torch.mps.Event speaks through the hooks, in numbers; torch.Event through the guard, in pointers.
struct EventPool {
  std::mutex mutex;
  std::map<uint32_t, Event> events;
  uint32_t last = 0;
  Event get(uint32_t id) {
    std::lock_guard<std::mutex> lock(mutex);
    return events.at(id);
  }
};
EventPool& pool() {
  static EventPool p;
  return p;
}

double milliseconds(const Event& start, const Event& end) {
  timeline::synchronize(); // a Mac waits for the whole queue here
  TORCH_CHECK(start.recorded && end.recorded, "Both events must be recorded before calculating elapsed time");
  TORCH_CHECK(end.moment >= start.moment, "End event was not recorded after start event");
  return double(end.moment - start.moment) / 1e6;
}

// ---------------------------------------------------------------- guard

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::MPS;
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device d) const override { TORCH_CHECK(d.is_mps(), "Expected a MPS device, but got ", d); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return timeline::done_at() <= timeline::now(); }
  void synchronizeStream(const c10::Stream&) const override { timeline::synchronize(); }
  void synchronizeDevice(c10::DeviceIndex) const override { timeline::synchronize(); }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event)
      *event = new Event;
    sim::record(*static_cast<Event*>(*event));
  }
  void block(void*, const c10::Stream&) const override {} // one queue: it is in order already
  bool queryEvent(void* e) const override { return !e || static_cast<Event*>(e)->moment <= timeline::now(); }
  void destroyEvent(void* e, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(e); }
  void synchronizeEvent(void* e) const override {
    if (e)
      timeline::wait_until(static_cast<Event*>(e)->moment);
  }
  double elapsedTime(void* start, void* end, c10::DeviceIndex) const override {
    return milliseconds(*static_cast<Event*>(start), *static_cast<Event*>(end));
  }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

// ---------------------------------------------------------------- random numbers

// An MPS generator with a CPU engine of its own, so that drawing on the device leaves the CPU's stream alone.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(uint64_t seed = c10::default_rng_seed_val)
      : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::MPS)),
        engine(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { engine.set_current_seed(seed); }
  void set_offset(uint64_t value) override { offset = value; }
  uint64_t get_offset() const override { return offset; }
  uint64_t current_seed() const override { return engine.current_seed(); }
  uint64_t seed() override { return engine.seed(); }
  void set_state(const c10::TensorImpl& state) override { engine.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return engine.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator;
    copy->engine = engine.clone();
    return copy;
  }
  at::Generator engine;
  uint64_t offset = 0;
};

} // namespace

c10::Allocator* allocator() {
  return &device_allocator;
}

c10::DataPtr adopt(c10::Storage cpu) {
  void* memory = cpu.mutable_data();
  if (!memory)
    return {nullptr, nullptr, &free_block, kDevice};
  const auto bytes = int64_t(cpu.nbytes());
  reserve(bytes);
  return {memory, new Block{nullptr, bytes, std::move(cpu)}, &free_block, kDevice};
}

void set_max_memory(int64_t bytes) {
  max_memory = bytes;
}

const at::Generator& default_generator() {
  static auto generator = at::make_generator<Generator>();
  return generator;
}

at::Generator& cpu_engine(const at::Generator& mps) {
  return static_cast<Generator*>(mps.unsafeGetGeneratorImpl())->engine;
}

// ---------------------------------------------------------------- hooks

// Without members: see replace(). PyTorch creates the class registered under this very name when it first asks.
struct MPSHooks : at::MPSHooksInterface {
  explicit MPSHooks(at::MPSHooksArgs = {}) {} // versions before 2.13 pass an argument
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 15; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  c10::Allocator* getMPSDeviceAllocator() const override { return allocator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize() const override { timeline::synchronize(); }
  void commitStream() const override {}
  void emptyCache() const override { device_allocator.emptyCache({0, 0}); }
  size_t getCurrentAllocatedMemory() const override { return allocated; }
  size_t getDriverAllocatedMemory() const override { return peak + (8 << 20); } // as if the cache kept the peak
  size_t getRecommendedMaxMemory() const override { return max_memory; }
  size_t getMaxBufferLength() const { return max_memory; } // not virtual in every version
  void setMemoryFraction(double ratio) const override { watermark = ratio; }
  void profilerStartTrace(const std::string&, bool) const override {}
  void profilerStopTrace() const override {}
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  uint32_t acquireEvent(bool timing) const override {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().events[++pool().last].timing = timing;
    return pool().last;
  }
  void releaseEvent(uint32_t id) const override {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().events.erase(id);
  }
  void recordEvent(uint32_t id) const override {
    std::lock_guard<std::mutex> lock(pool().mutex);
    record(pool().events.at(id));
  }
  void waitForEvent(uint32_t) const override {} // the queue waits, not the host
  void synchronizeEvent(uint32_t id) const override { timeline::wait_until(pool().get(id).moment); }
  bool queryEvent(uint32_t id) const override { return pool().get(id).moment <= timeline::now(); }
  double elapsedTimeOfEvents(uint32_t start, uint32_t end) const override {
    const Event a = pool().get(start), b = pool().get(end);
    TORCH_CHECK(a.timing && b.timing, "Events were not created with argument 'enable_timing=True'");
    return milliseconds(a, b);
  }
};

struct NoCuda : at::CUDAHooksInterface {};

// PyTorch makes each hooks object once and keeps it: `import torch` has asked for CUDA's, and someone may have asked
// for MPS's before us. The objects are bare vtable pointers, so ours can be made in their place.
template <class Ours, class Interface>
void replace(const Interface& hooks) {
  static_assert(sizeof(Ours) == sizeof(void*) && sizeof(Interface) == sizeof(void*));
  new (const_cast<Interface*>(&hooks)) Ours();
}

void take_over_hooks() {
  if (!at::detail::getMPSHooks().hasMPS())
    replace<MPSHooks>(at::detail::getMPSHooks());
  if (at::CUDAHooksRegistry()->Has("CUDAHooks"))
    replace<NoCuda>(at::detail::getCUDAHooks());
}

} // namespace sim

namespace at {
using sim::MPSHooks;
REGISTER_MPS_HOOKS(MPSHooks)
} // namespace at
