#include "slots/policy.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "gguf_pager.h"

/* Least recently used, counted in layers. Ages in tokens tie often, because a token visits every layer once; among
 * equals the one whose layer is farthest away will be missed last. Plain time would give up the layer that comes next. */
static double recency(const gp_use *use) {
    return -((double) use->age * use->n_layers + use->away);
}

/* Tokens after which a use counts half. Tuned together with the rest of the formula on the first layers of two recordings;
 * others gain as much (benchmarks/LOG.md). */
enum { RECENT_HALF_LIFE = 32, LASTING_HALF_LIFE = 512 };
static const double lasting_weight = 1.0 / 8;

/* What is left of 1 after `age` tokens; straight between halvings, because libm's exp2 would cost more than all the rest. */
static double fade(uint64_t age, uint32_t half_life) {
    const uint64_t halvings = age / half_life;
    const double since = (double) (age % half_life) / half_life;
    return halvings < 64 ? (1 - since / 2) / (double) (UINT64_C(1) << halvings) : 0;
}

double gp_uses_lasting(const gp_uses *uses, uint64_t age) {
    return uses->lasting * fade(age, LASTING_HALF_LIFE);
}

gp_uses gp_uses_in_batch(uint32_t n_tokens) {
    double recent = 0, lasting = 0;
    for (uint32_t age = 0; age < n_tokens; age++) {
        recent += fade(age, RECENT_HALF_LIFE);
        lasting += fade(age, LASTING_HALF_LIFE);
    }
    return (gp_uses) { (float) (recent / n_tokens), (float) (lasting / n_tokens) };
}

void gp_uses_add(gp_uses *uses, uint64_t age, uint32_t n_choices, const gp_uses *each) {
    uses->recent = (float) (uses->recent * fade(age, RECENT_HALF_LIFE)) + (float) n_choices * each->recent;
    uses->lasting = (float) gp_uses_lasting(uses, age) + (float) n_choices * each->lasting;
}

/* Uses per age, frequency and recency in one, as a guess at how long it will take until the expert is wanted: in tokens, of
 * which the way to its layer is a part. Replayed on the "code" trace of Qwen3-30B (scripts/replay_policies.py): 61.9 MB per
 * token at 25 % resident, 14.5 at 50 %; LRU 70.4 and 15.5. */
static double uses_per_age(const gp_use *use) {
    const double uses = use->uses.recent * fade(use->age, RECENT_HALF_LIFE)
        + lasting_weight * gp_uses_lasting(&use->uses, use->age);
    const double root = sqrt((double) use->age + 1);
    return -(root * sqrt(root) / uses + (double) use->away / use->n_layers);
}

static const gp_policy policies[] = {
    { "lru",  recency },
    { "lfru", uses_per_age },
};

const gp_policy *gp_policy_find(const char *name) {
    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; i++) {
        if (strcmp(policies[i].name, name) == 0) {
            return &policies[i];
        }
    }
    return NULL;
}

bool gp_policy_exists(const char *name) {
    return gp_policy_find(name) != NULL;
}
