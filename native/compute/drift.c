#include "compute/drift.h"

#include <math.h>
#include <stdlib.h>

/* So many tokens count; a line is not drawn through fewer than the second. 64 and 512 tokens were as good. */
enum { SPAN = 256, FEWEST = 8 };
/* What is no number, or one whose square is none, would stay in the means for good: it is taken for the mean. */
static const float MOST = 1e18f;

bool gp_drift_open(gp_drift *d, int64_t n) {
    d->here = calloc(4 * (size_t) n, sizeof *d->here);
    if (!d->here) {
        return false;
    }
    d->next = d->here + n;
    d->variance = d->next + n;
    d->covariance = d->variance + n;
    return true;
}

void gp_drift_close(gp_drift *d) {
    free(d->here);
    *d = (gp_drift) { 0 };
}

/* Means that fade: at first of all that was seen. */
void gp_drift_learn(gp_drift *d, int64_t n, const float *here, const float *next) {
    d->n_seen += d->n_seen < SPAN;
    const float rate = 1 / (float) d->n_seen;
    for (int64_t i = 0; i < n; i++) {
        const bool is_sound = fabsf(here[i]) < MOST && fabsf(next[i]) < MOST;
        const float from_here = is_sound ? here[i] - d->here[i] : 0, from_next = is_sound ? next[i] - d->next[i] : 0;
        d->here[i] += rate * from_here;
        d->next[i] += rate * from_next;
        d->variance[i] += rate * ((1 - rate) * from_here * from_here - d->variance[i]);
        d->covariance[i] += rate * ((1 - rate) * from_here * from_next - d->covariance[i]);
    }
}

void gp_drift_follow(const gp_drift *d, int64_t n, const float *here, float *next) {
    for (int64_t i = 0; i < n; i++) {
        const float slope = d->n_seen >= FEWEST && d->variance[i] > 0 ? d->covariance[i] / d->variance[i] : 1;
        next[i] = d->next[i] + slope * (here[i] - d->here[i]);
    }
}
