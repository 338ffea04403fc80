// A queue with a clock: kernels take planned time on the device while the host runs ahead.
//
// Results are there at once (the CPU computed them); only the moment at which a Mac would have them is simulated.
// The whole state is one moment, `busy_until`: one queue, in order, as torch.mps has it.
#include "sim.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <thread>

namespace sim::timeline {
namespace {
std::atomic<int64_t> busy_until{0};
std::atomic<bool> has_plan{false};
std::atomic<double> ns_per_kernel{0}, ns_per_byte{0}, ns_per_flop{0};
// A sleep may end this late on a busy machine: the rest is spun.
constexpr int64_t kSpin = 2'000'000;
} // namespace

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Counts& counts() {
  static Counts c;
  return c;
}

bool planned() {
  return has_plan;
}

void set_plan(double us_per_kernel, double us_per_megabyte, double us_per_gigaflop) {
  ns_per_kernel = us_per_kernel * 1e3;
  ns_per_byte = us_per_megabyte * 1e3 / 1e6;
  ns_per_flop = us_per_gigaflop * 1e3 / 1e9;
  has_plan = us_per_kernel != 0 || us_per_megabyte != 0 || us_per_gigaflop != 0;
}

int64_t cost(int64_t bytes, int64_t flops) {
  return int64_t(ns_per_kernel + ns_per_byte * double(bytes) + ns_per_flop * double(flops));
}

void enqueue(int64_t nanoseconds) {
  counts().kernels++;
  if (nanoseconds <= 0)
    return;
  counts().device_ns += nanoseconds;
  const int64_t start = now();
  int64_t before = busy_until;
  while (!busy_until.compare_exchange_weak(before, std::max(before, start) + nanoseconds)) {
  }
}

int64_t done_at() {
  return std::max(now(), busy_until.load());
}

void wait_until(int64_t moment) {
  counts().waits++;
  const int64_t start = now();
  if (moment <= start)
    return;
  if (moment - start > kSpin) {
    const int64_t until = moment - kSpin; // steady_clock is CLOCK_MONOTONIC on Linux
    const timespec t{time_t(until / 1'000'000'000), long(until % 1'000'000'000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) != 0) {
    }
  }
  while (now() < moment)
    std::this_thread::yield();
  counts().waited_ns += now() - start;
}

void synchronize() {
  wait_until(busy_until);
}

} // namespace sim::timeline
