// Routed experts in mapped files, of which a budget of bytes is kept in memory.
//
// The kernels read experts in place. A forward claims the experts of one layer before it computes them: those that are
// not in memory are read by a few threads, several at a time, and least recently used ones are dropped for them, from
// the process and from the system's page cache. An expert counts from before its first byte is read until after its
// last page is dropped, in whole pages: this sum never exceeds the budget.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dsv4 {

// Whole pages of a mapped file: an address in this process, bytes, and their place in the file.
struct Pages {
    uintptr_t first;
    int64_t size;
    int file;
    int64_t offset;
};

struct ResidencyCounts {
    int64_t hits = 0;             // claimed experts that were in memory or being read ahead
    int64_t misses = 0;           // claimed experts that had to be read
    int64_t read_ahead_hits = 0;  // those hits that were read ahead
    int64_t bytes_read = 0;       // of experts read, ahead or not
    int64_t evictions = 0;
    int64_t resident_bytes = 0;  // now, experts being read included
    int64_t peak_bytes = 0;      // most of them at any time
};

class ExpertResidency {
   public:
    // pages[layer * experts + expert]; files are descriptors, which are duplicated. Drops all experts first. The
    // mapping must outlive this object, and the budget hold any experts that one claim needs at the same time.
    ExpertResidency(int64_t budget, int64_t experts, std::vector<std::vector<Pages>> pages,
                    const std::vector<int>& files);
    ~ExpertResidency();
    ExpertResidency(const ExpertResidency&) = delete;
    ExpertResidency& operator=(const ExpertResidency&) = delete;

    // Begins to read experts of (layer, experts) that a forward is certain to claim, in this order, until half of the
    // budget is set aside for them.
    void read_ahead(const std::vector<std::pair<int64_t, std::vector<int32_t>>>& certain);

    ResidencyCounts counts();

   private:
    friend class ExpertClaim;

    void start_up(std::vector<std::vector<Pages>> pages, const std::vector<int>& files);
    void stop();

    enum class State { absent, reading, resident, leaving };

    struct Expert {
        std::vector<Pages> pages;
        int64_t size = 0;
        State state = State::absent;
        bool claimed = false;     // by the current claim, which has not finished with it
        bool ahead = false;       // in ahead_, or will be once it is read
        bool read_ahead = false;  // its last read was ahead of a claim
        std::list<size_t>::iterator place;
    };

    // Drop some experts, then read one; `surplus` bytes are free in between.
    struct Job {
        size_t expert;
        std::vector<size_t> victims;
        int64_t surplus;
    };

    // These need mutex_.
    bool start(size_t id);
    void start_waiting();
    void take_from_list(Expert& expert);
    void put_into_list(size_t id);
    std::vector<Pages> release_pages(const std::vector<size_t>& victims);
    void hold_pages(const Expert& expert);

    void work();
    void drop(const Pages& pages) const;
    void read(const Expert& expert) const;

    const int64_t budget_, experts_per_layer_;
    std::vector<Expert> experts_;
    std::vector<int> files_;

    std::mutex turn_;  // held by the claim
    std::mutex mutex_;
    std::condition_variable jobs_changed_, experts_changed_;
    std::deque<Job> jobs_;
    std::deque<size_t> waiting_;        // claimed experts not yet being read, in the claim's order
    std::list<size_t> unused_, ahead_;  // resident and not claimed, least recently used first; set aside by read_ahead
    int64_t unused_bytes_ = 0, ahead_bytes_ = 0, free_;
    std::unordered_map<uintptr_t, int> holders_;  // resident experts per page that may hold parts of several
    ResidencyCounts counts_;
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

// The experts of one layer while they are computed. Claims of one ExpertResidency take turns. Experts that are never
// waited for at the same time need not fit into the budget together: reading goes on as experts are done.
class ExpertClaim {
   public:
    // Begins to read; `experts`, without repeats, are reordered: those in memory first, then those being read.
    ExpertClaim(ExpertResidency& residency, int64_t layer, std::vector<int32_t>& experts);
    ~ExpertClaim();
    ExpertClaim(const ExpertClaim&) = delete;
    ExpertClaim& operator=(const ExpertClaim&) = delete;

    // Returns when an expert is in memory. Experts must be waited for in their order, by any threads.
    void wait(int32_t expert);
    // Removes from `experts` and returns those in memory, at least one.
    std::vector<int32_t> take_ready(std::vector<int32_t>& experts);
    // Gives up an expert, which is in memory.
    void done(int32_t expert);

   private:
    size_t id(int32_t expert) const { return first_ + static_cast<size_t>(expert); }

    ExpertResidency& residency_;
    std::unique_lock<std::mutex> turn_;
    size_t first_;
    std::vector<int32_t> claimed_;
};

}  // namespace dsv4
