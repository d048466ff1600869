// Kernels that never end: those that touch memory or synchronise are counted at it, others are found by a timer.
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <stdexcept>

#include "runtime.h"
#include "schedule.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace simt {

Patience patience;

void stop_endless(Code code, std::string text) {
  Report finding{.kind = Kind::endless, .now = side(*current, code, "still ran")};
  finding.text = std::move(text);
  stop(std::move(finding));
}

#ifdef __x86_64__
namespace {

uint64_t seen;
Code interrupted;

void leave() { stop_endless(interrupted, "it loops without an access to memory"); }

// The signal's return goes into leave(), on the fiber's stack, unless a function of another library was interrupted.
void on_tick(int, siginfo_t*, void* context) {
  if (!in_kernel) return;
  const uint64_t progress = state.accesses + state.switches;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto at = reinterpret_cast<const char*>(registers[REG_RIP]);
  if (progress == seen && at >= &__ehdr_start && at < &_end) {
    constexpr greg_t kRedZone = 128;
    interrupted = code_of(at) + 1;  // as a call there would return to
    registers[REG_RIP] = reinterpret_cast<greg_t>(&leave);
    registers[REG_RSP] = ((registers[REG_RSP] - kRedZone) & ~greg_t{15}) - 8;
  }
  seen = progress;
}

timer_t timer_of_this_thread() {
  static thread_local const timer_t timer = [] {
    struct sigaction action{};
    action.sa_sigaction = on_tick;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
    timer_t made;
    if (sigaction(SIGVTALRM, &action, nullptr) != 0 || timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &made) != 0) {
      throw std::runtime_error("simt: no timer");
    }
    return made;
  }();
  return timer;
}

void set_timer(double seconds) {
  const auto whole = static_cast<time_t>(seconds);
  const timespec interval{whole, static_cast<long>((seconds - static_cast<double>(whole)) * 1e9)};
  const itimerspec both{interval, interval};
  timer_settime(timer_of_this_thread(), 0, &both, nullptr);
}

}  // namespace

Watchdog::Watchdog() {
  seen = 0;
  set_timer(patience.seconds);
}
Watchdog::~Watchdog() { set_timer(0); }
#else
Watchdog::Watchdog() {}
Watchdog::~Watchdog() {}
#endif

}  // namespace simt
