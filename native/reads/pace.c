#include "reads/pace.h"

uint32_t gp_pace_choose(const gp_pace *paces, uint32_t n_disks, uint64_t bytes) {
    uint32_t best = 0;
    double soonest_ns = -1;
    for (uint32_t i = 0; i < n_disks; i++) {
        const gp_pace *pace = &paces[i];
        if (pace->n_done == 0) {
            if (pace->waiting_bytes == 0) {
                return i;
            }
            continue;
        }
        const double ns = (double) (pace->waiting_bytes + bytes) * (double) pace->busy_ns / (double) pace->done_bytes;
        if (soonest_ns < 0 || ns < soonest_ns) {
            best = i;
            soonest_ns = ns;
        }
    }
    return best;
}

void gp_pace_begin(gp_pace *pace, uint64_t bytes, uint64_t now_ns) {
    if (pace->waiting_bytes == 0) {
        pace->marked_ns = now_ns;
    }
    pace->waiting_bytes += bytes;
}

void gp_pace_end(gp_pace *pace, uint64_t bytes, bool has_come, uint64_t now_ns) {
    if (now_ns > pace->marked_ns) {     /* another thread may have been later with an earlier time */
        pace->busy_ns += now_ns - pace->marked_ns;
        pace->marked_ns = now_ns;
    }
    pace->waiting_bytes -= bytes;
    if (has_come) {     /* a disk that fails at once, or was spared a read, is not fast */
        pace->done_bytes += bytes;
        pace->n_done++;
    }
}

void gp_pace_forget_half(gp_pace *pace) {
    pace->n_done /= 2;
    pace->done_bytes /= 2;
    pace->busy_ns /= 2;
}
