// The threads that share a plan's steps, meant for ThreadSanitizer: every index of a loop is visited once, loops follow
// each other closely or after a sleep, several callers come at once, bodies throw. `sodfast_threads_tests [rounds]`.
#include "plan/threads.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace {

using sodfast::plan::Threads;

[[noreturn]] void fail(const char* what, int64_t got, int64_t expected) {
  std::printf("FAILED %s: %lld, not %lld\n", what, static_cast<long long>(got), static_cast<long long>(expected));
  std::exit(1);
}

// Plain numbers: two threads that visit one index, or a caller that goes on too early, are a race too.
struct Visits {
  std::vector<int> times;
  int64_t throws_at = -1;

  static void visit(void* context, int64_t begin, int64_t end) {
    Visits& visits = *static_cast<Visits*>(context);
    for (int64_t i = begin; i < end; ++i) {
      if (i == visits.throws_at) throw std::runtime_error(std::to_string(i));
      ++visits.times[static_cast<size_t>(i)];
    }
  }
};

void run(Threads& threads, int rounds, unsigned seed) {
  for (int round = 0; round < rounds; ++round) {
    seed = seed * 1664525u + 1013904223u;
    const int64_t n = seed >> 8 & 63, grain = 1 + (seed >> 16 & 3);
    Visits visits{std::vector<int>(static_cast<size_t>(n)), (seed >> 28) == 0 && n > 0 ? n / 2 : -1};
    int64_t caught = -1;
    try {
      threads.run(n, grain, Visits::visit, &visits, 1 + static_cast<int>(seed >> 20 & 7));
    } catch (const std::runtime_error& error) {
      caught = std::stoll(error.what());
    }
    if (caught != visits.throws_at) fail("exception of", caught, visits.throws_at);
    for (int64_t i = 0; visits.throws_at < 0 && i < n; ++i)
      if (visits.times[static_cast<size_t>(i)] != 1) fail("visits", visits.times[static_cast<size_t>(i)], 1);
    if ((seed >> 24 & 63) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // they fall asleep
  }
}

// Every range waits until all have begun, so that it ends only if every thread takes one; also those that sleep.
void meet(Threads& threads) {
  struct Meeting {
    std::atomic<int> arrived{0};
    int expected;
    static void come(void* context, int64_t, int64_t) {
      Meeting& meeting = *static_cast<Meeting*>(context);
      ++meeting.arrived;
      const auto start = std::chrono::steady_clock::now();
      while (meeting.arrived < meeting.expected) {
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60))
          fail("threads that take part", meeting.arrived, meeting.expected);
        std::this_thread::yield();
      }
    }
  };
  for (int time = 0; time < 20; ++time) {
    Meeting meeting;
    meeting.expected = 1 + time % threads.size();
    threads.run(100, 1, Meeting::come, &meeting, meeting.expected);
    if (meeting.arrived != meeting.expected) fail("ranges", meeting.arrived, meeting.expected);
    if (time % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // they fall asleep
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20000;
  for (const int size : {1, 2, 5}) {
    Threads threads(size);
    if (threads.size() != size) fail("size", threads.size(), size);
    meet(threads);
    run(threads, rounds, 1);
    std::vector<std::thread> callers;
    for (unsigned seed = 2; seed < 5; ++seed) callers.emplace_back([&, seed] { run(threads, rounds, seed); });
    for (std::thread& caller : callers) caller.join();
    std::printf("ok  %d threads, %d loops by one caller and by three\n", size, rounds);
  }
  for (int i = 0; i < rounds / 100; ++i) Threads(3);  // made and gone, without a loop
  return 0;
}
