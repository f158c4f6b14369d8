#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

// IEEE arithmetic to nearest even, denormals and all, whatever mode the caller has set for its own threads (and the
// pool's have inherited). Restored at the end.
class IeeeMode {
 public:
#if defined(__x86_64__)
  IeeeMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

struct Job {
  const std::function<void(int64_t, int)>* work;
  int64_t count;
  int workers;
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};

  void run(int worker) {
    [[maybe_unused]] const IeeeMode mode;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*work)(i, worker);
  }
};

class Pool {
 public:
  void run(Job& job) {
    grow(job.workers - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      job.running = job.workers - 1;
      ++generation_;
    }
    wake_.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return job.running == 0; });
    job_ = nullptr;
  }

  std::mutex busy;

 private:
  void grow(int wanted) {
    while (int(threads_.size()) < wanted) {
      const int worker = int(threads_.size()) + 1;
      threads_.emplace_back([this, worker, seen = generation_] { serve(worker, seen); });
      threads_.back().detach();
    }
  }

  void serve(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* job = job_;
      if (!job || worker >= job->workers) continue;
      lock.unlock();
      job->run(worker);
      lock.lock();
      if (--job->running == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
};

// One pool a process; a forked child has none of its parent's threads and makes its own. Never destroyed: its threads
// sleep until the process ends.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    instance = new Pool;
    owner = getpid();
  }
  return *instance;
}

}  // namespace

int default_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& work) {
  if (threads <= 0) threads = default_threads();
  if (threads > count) threads = int(count);
  Job job;
  job.work = &work, job.count = count, job.workers = threads;
  if (threads > 1) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> alone(shared.busy, std::try_to_lock);
    if (alone.owns_lock()) return shared.run(job);
  }
  job.run(0);
}
