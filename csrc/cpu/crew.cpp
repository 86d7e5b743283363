#include "crew.h"

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include <pthread.h>

namespace cwclip::cpu {
namespace {

struct Crew {
  std::mutex mutex;
  std::condition_variable wake, all_done;
  const std::function<void()>* job = nullptr;
  int64_t seats = 0;   // helpers that may still join the job
  int64_t active = 0;  // helpers at work on it
  int64_t hired = 0;   // helpers there are
  bool taken = false;  // some caller's job is on
};

void serve(Crew& crew) {
  std::unique_lock<std::mutex> lock(crew.mutex);
  for (;;) {
    crew.wake.wait(lock, [&] { return crew.seats > 0; });
    --crew.seats;
    ++crew.active;
    const std::function<void()>& job = *crew.job;
    lock.unlock();
    job();
    lock.lock();
    if (--crew.active == 0) crew.all_done.notify_one();
  }
}

// Never deleted: the threads wait on it until the process ends.
Crew* the_crew = nullptr;

Crew& crew_of_this_process() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_crew = new Crew;
    // Threads don't survive a fork, and the lock may have been held by one of them: a child hires its own.
    pthread_atfork(nullptr, nullptr, [] { the_crew = new Crew; });
  });
  return *the_crew;
}

void hire(Crew& crew, int64_t helpers) {
  while (crew.hired < helpers) {
    try {
      std::thread(serve, std::ref(crew)).detach();
    } catch (const std::system_error&) {
      return;  // the system has no more threads to give; fewer do the same work
    }
    ++crew.hired;
  }
}

}  // namespace

void run_with_helpers(int64_t helpers, const std::function<void()>& work) {
  if (helpers <= 0) return work();
  Crew& crew = crew_of_this_process();
  {
    const std::lock_guard<std::mutex> lock(crew.mutex);
    helpers = crew.taken ? 0 : helpers;
    if (helpers > 0) {
      hire(crew, helpers);
      crew.taken = true;
      crew.job = &work;
      crew.seats = helpers;
    }
  }
  if (helpers == 0) return work();  // another thread of the program has the crew: alone, rather than wait
  crew.wake.notify_all();
  work();
  std::unique_lock<std::mutex> lock(crew.mutex);
  crew.seats = 0;
  crew.all_done.wait(lock, [&] { return crew.active == 0; });
  crew.taken = false;
}

}  // namespace cwclip::cpu
