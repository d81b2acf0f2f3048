#include "barrier.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace tenfold {
namespace {

constexpr long kSpins = 2000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

void give_way() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

}  // namespace

void Barrier::wait() {
  const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    return;
  }
  for (long spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins)
    spins < kSpins ? pause() : give_way();
}

}  // namespace tenfold
