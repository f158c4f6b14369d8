// A small thread pool: parallel_for over numbered pieces of work, pulled one by one, so that uneven pieces balance.
#pragma once
#include <cstdint>
#include <functional>

// Calls work(index, worker) for every index in [0, count), on at most `threads` threads (0: one a core), the caller's
// among them; worker < threads tells scratch apart. A call from inside, or beside, a running one does its work alone.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t index, int worker)>& work);

int default_threads();
