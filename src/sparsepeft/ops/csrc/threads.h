// The threads of an operator: those that torch computes with, since a second team would compete with it for the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// GOMP_parallel of torch's OpenMP runtime, or null: then the calling thread works alone.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// Run `worker(next, thread)` on up to `threads` threads; a worker draws its items from `next`. The runtime may give
// fewer threads than asked for, so no worker may count on the others.
template <class Worker>
void run_threads(Parallel parallel, int64_t threads, const Worker& worker) {
    struct Team {
        const Worker& worker;
        std::atomic<int64_t> next{0}, threads{0};
        static void join(void* team) {
            Team& t = *static_cast<Team*>(team);
            t.worker(t.next, t.threads++);
        }
    } team{worker};
    if (parallel && threads > 1) parallel(Team::join, &team, static_cast<unsigned>(threads), 0);
    else Team::join(&team);
}
