// Runs a Metal kernel on the CPU: every lane of a threadgroup is a coroutine with a stack of its own.
//
// A lane runs until it meets a threadgroup barrier or a SIMD operation, or ends. The lanes of a SIMD group (32) that
// stand at the same SIMD operation exchange values and go on together; all lanes of the threadgroup meet at a
// barrier. Lanes that stand at different operations have diverged in a way whose result Metal leaves open: an error.
// Threadgroups run one after the other in one thread, so threadgroup memory can be static and atomics plain.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim {

constexpr unsigned kSimdWidth = 32, kMaxLanes = 1024, kSlotBytes = 32;
constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;

struct Size {
  unsigned x, y, z;
  unsigned count() const { return x * y * z; }
};

#if defined(__x86_64__)
// Saves the callee-saved registers on the present stack, and goes on where the other stack stopped.
extern "C" void sim_switch(void** save, void* load);
asm(R"(
.text
.type sim_switch, @function
.local sim_switch
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
struct Context {
  void* pointer = nullptr;
  void start(char* stack_end, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack_end) - 2; // a call leaves the stack 8 bytes off 16
    *top = reinterpret_cast<void*>(entry);
    pointer = top - 6; // six registers, of any value
  }
  void to(Context& other) { sim_switch(&pointer, other.pointer); }
};
#else
struct Context {
  ucontext_t state;
  void start(char* stack_end, void (*entry)()) {
    getcontext(&state);
    state.uc_stack = {stack_end - kStackBytes, 0, kStackBytes};
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

enum class At { kStart, kReady, kSimd, kBarrier, kEnd };

struct Lane {
  Context context;
  char* stack = nullptr;
  At at = At::kStart;
  unsigned site = 0, operation = 0; // where it waits: source line and kind
  uint32_t active = 0; // lanes of its SIMD group that took part in the last SIMD operation
  unsigned index = 0; // in the threadgroup
  Size in_group, in_grid;
};

struct Group {
  using Kernel = void (*)(void** buffers);
  Kernel kernel;
  void** buffers;
  Size grid, size, nominal, position, groups; // `size` is smaller than `nominal` at the edge of the grid
  Context scheduler;
  Lane lanes[kMaxLanes];
  // Values that lanes bring to a SIMD operation, and those of the last one that its lanes may still have to read.
  alignas(16) char brought[kMaxLanes][kSlotBytes];
  alignas(16) char slots[kMaxLanes][kSlotBytes];
  // What the first lane of a SIMD group computed from them; the group goes on in the order of its lanes.
  alignas(16) char results[kMaxLanes / kSimdWidth][kSlotBytes];
  char* free_stacks[kMaxLanes];
  unsigned free_count = 0;
  Lane* lane = nullptr; // the one that runs
  char* error = nullptr;
};
static Group group;

static void lane_main() {
  group.kernel(group.buffers);
  group.lane->at = At::kEnd;
  group.lane->context.to(group.scheduler);
  __builtin_unreachable();
}

static char* take_stack() {
  if (group.free_count)
    return group.free_stacks[--group.free_count];
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    return nullptr;
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes + kStackBytes;
}

static void wait(At at, unsigned operation, unsigned site) {
  Lane* lane = group.lane;
  lane->at = at;
  lane->operation = operation;
  lane->site = site;
  lane->context.to(group.scheduler);
}

static bool fail(const char* what) {
  if (group.error[0] == 0)
    std::snprintf(group.error, 200, "%s (threadgroup %u,%u,%u)", what, group.position.x, group.position.y,
        group.position.z);
  return false;
}

static bool resume(Lane& lane) {
  if (lane.at == At::kStart) {
    lane.stack = take_stack();
    if (!lane.stack)
      return fail("no memory for the stacks of its lanes");
    lane.context.start(lane.stack, lane_main);
  }
  lane.at = At::kReady;
  group.lane = &lane;
  group.scheduler.to(lane.context);
  if (lane.at == At::kEnd)
    group.free_stacks[group.free_count++] = lane.stack;
  return true;
}

// Runs one SIMD group until each of its lanes has ended or stands at a barrier.
static bool run_simd_group(unsigned first, unsigned last) {
  for (;;) {
    for (unsigned i = first; i < last; i++)
      if ((group.lanes[i].at == At::kStart || group.lanes[i].at == At::kReady) && !resume(group.lanes[i]))
        return false;
    uint32_t active = 0;
    const Lane* leader = nullptr;
    for (unsigned i = first; i < last; i++) {
      const Lane& lane = group.lanes[i];
      if (lane.at != At::kSimd)
        continue;
      if (leader && (lane.site != leader->site || lane.operation != leader->operation))
        return fail("lanes of a SIMD group meet different SIMD operations");
      leader = leader ? leader : &lane;
      active |= 1u << (i - first);
    }
    if (!leader)
      return true;
    for (unsigned i = first; i < last; i++)
      if (group.lanes[i].at == At::kSimd) {
        group.lanes[i].at = At::kReady;
        group.lanes[i].active = active;
        std::memcpy(group.slots[i], group.brought[i], kSlotBytes);
      }
  }
}

static bool run_group() {
  const unsigned count = group.size.count();
  for (unsigned i = 0; i < count; i++) {
    Lane& lane = group.lanes[i];
    lane.at = At::kStart;
    lane.index = i;
    lane.in_group = {i % group.size.x, i / group.size.x % group.size.y, i / (group.size.x * group.size.y)};
    lane.in_grid = {group.position.x * group.nominal.x + lane.in_group.x,
        group.position.y * group.nominal.y + lane.in_group.y, group.position.z * group.nominal.z + lane.in_group.z};
  }
  for (;;) {
    for (unsigned first = 0; first < count; first += kSimdWidth)
      if (!run_simd_group(first, first + kSimdWidth < count ? first + kSimdWidth : count))
        return false;
    const Lane* leader = nullptr;
    for (unsigned i = 0; i < count; i++) {
      Lane& lane = group.lanes[i];
      if (lane.at != At::kBarrier)
        continue;
      if (leader && lane.site != leader->site)
        return fail("lanes of a threadgroup wait at different barriers");
      leader = leader ? leader : &lane;
      lane.at = At::kReady;
    }
    if (!leader)
      return true;
  }
}

// Returns 0, or 1 with a text in `error` (200 bytes).
static int launch(Group::Kernel kernel, void** buffers, const unsigned* grid, const unsigned* size, char* error) {
  group.kernel = kernel;
  group.buffers = buffers;
  group.grid = {grid[0], grid[1], grid[2]};
  group.nominal = {size[0], size[1], size[2]};
  group.error = error;
  auto ceil_div = [](unsigned a, unsigned b) { return (a + b - 1) / b; };
  group.groups = {ceil_div(grid[0], size[0]), ceil_div(grid[1], size[1]), ceil_div(grid[2], size[2])};
  auto edge = [](unsigned grid, unsigned position, unsigned size) {
    return grid - position * size < size ? grid - position * size : size;
  };
  Size& p = group.position;
  for (p.z = 0; p.z < group.groups.z; p.z++)
    for (p.y = 0; p.y < group.groups.y; p.y++)
      for (p.x = 0; p.x < group.groups.x; p.x++) {
        group.size = {edge(grid[0], p.x, size[0]), edge(grid[1], p.y, size[1]), edge(grid[2], p.z, size[2])};
        if (!run_group())
          return 1;
      }
  return error[0] != 0; // of a lane's own
}

// What the lanes of the SIMD group published at this operation; `active` says whose values are there.
template <class T>
struct Published {
  const char (*slots)[kSlotBytes];
  uint32_t active;
  unsigned lane;
  bool has(unsigned i) const { return i < kSimdWidth && (active >> i & 1); }
  unsigned first() const { return unsigned(__builtin_ctz(active)); }
  T operator[](unsigned i) const {
    T value;
    std::memcpy(&value, slots[i], sizeof(T));
    return value;
  }
};

template <class T>
Published<T> publish(const T& value, unsigned operation, unsigned site) {
  static_assert(sizeof(T) <= kSlotBytes);
  Lane& lane = *group.lane;
  const unsigned first = lane.index / kSimdWidth * kSimdWidth;
  std::memcpy(group.brought[lane.index], &value, sizeof(T));
  wait(At::kSimd, operation, site);
  return {&group.slots[first], lane.active, lane.index - first};
}

} // namespace sim
