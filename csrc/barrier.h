// Threads that wait for each other, often.
#pragma once

namespace tenfold {

// OpenMP's own barrier spins for milliseconds. Where other programs want the processors, that time
// is taken from the thread that is waited for; this one spins for microseconds and then gives way.
class Barrier {
 public:
  // Say how many threads there are, before any of them waits.
  void expect(int threads) { threads_ = threads; }
  void wait();

 private:
  int threads_ = 1;
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
};

}  // namespace tenfold
