/* Memory for the rows of experts that are being computed: blocks that are taken at once never overlap, whatever the order in which
 * they come back, and all of it is to be had again. */
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "compute/scratch.h"
#include "fake_os.h"

enum { BYTES = 4096, THREADS = 4 };

static char memory[BYTES];
static gp_scratch scratch;

typedef struct {
    char    *at;
    size_t   bytes;
    uint32_t block;
    char     mark;
} taken;

static bool take(taken *t, size_t bytes, char mark) {
    t->bytes = bytes;
    t->mark = mark;
    t->at = gp_scratch_take(&scratch, bytes, &t->block);
    if (t->at) {
        CHECK(t->at >= memory && t->at + bytes <= memory + BYTES, "a block lies within the memory");
        memset(t->at, mark, bytes);
    }
    return t->at != NULL;
}

static void give_back(taken *t) {
    for (size_t i = 0; i < t->bytes; i++) {
        CHECK(t->at[i] == t->mark, "nobody else had it meanwhile");
    }
    gp_scratch_give_back(&scratch, t->block);
    t->at = NULL;
}

static void begin(size_t bytes) {
    gp_scratch_begin(&scratch, memory, bytes);
}

static void whole_memory_is_one_block(void) {
    taken all, more;
    begin(BYTES);
    CHECK(!take(&all, BYTES + 1, 'x'), "what is larger than the memory has no place");
    for (int i = 0; i < 3; i++) {
        CHECK(take(&all, BYTES, 'a'), "a block may be as large as the memory");
        CHECK(!take(&more, 1, 'b'), "then there is no room");
        give_back(&all);
    }
    begin(0);
    CHECK(!take(&more, 1, 'b'), "no memory has no room");
}

/* Given back in another order: the room of a younger one comes with the oldest's. */
static void goes_round_the_end(void) {
    taken t[4], more;
    begin(1000);
    CHECK(take(&t[0], 400, 'a') && take(&t[1], 400, 'b'), "two have room");
    CHECK(!take(&more, 300, 'x'), "at the end there are 200, before the oldest none");
    give_back(&t[0]);
    CHECK(!take(&more, 401, 'x'), "round the end there are 400");
    CHECK(take(&t[2], 400, 'c') && t[2].at == memory, "which are taken");
    CHECK(!take(&more, 1, 'x'), "up to the oldest that is left");
    give_back(&t[2]);
    CHECK(!take(&more, 1, 'x'), "what is given back before an older one waits for it");
    give_back(&t[1]);
    CHECK(take(&t[3], 1000, 'd'), "then all is there");
    give_back(&t[3]);
}

static void so_many_blocks_and_no_more(void) {
    static taken t[GP_BLOCKS];
    taken more;
    for (int round = 0; round < 3; round++) {
        begin(BYTES);
        for (int i = 0; i < GP_BLOCKS; i++) {
            CHECK(take(&t[i], 8, (char) i), "each has its place");
        }
        CHECK(!take(&more, 8, 'x'), "one more has none, although there is memory");
        for (int i = 0; i < GP_BLOCKS; i++) {
            give_back(&t[round == 1 ? GP_BLOCKS - 1 - i : i]);
        }
        CHECK(take(&more, BYTES, 'y'), "then all is there");
        give_back(&more);
    }
}

/* Any order of taking and giving back. */
static void random_orders(void) {
    taken t[GP_BLOCKS] = { 0 };
    unsigned n_taken = 0, n_refused = 0;
    begin(BYTES);
    for (int i = 0; i < 200000; i++) {
        taken *one = &t[fake_random(GP_BLOCKS)];
        if (one->at) {
            give_back(one);
            n_taken--;
        } else if (take(one, 1 + fake_random(fake_random(3) ? 100 : 1500), (char) i)) {
            n_taken++;
        } else {
            CHECK(n_taken > 0, "the first of all has room");
            n_refused++;
        }
    }
    CHECK(n_refused > 1000 && n_refused < 190000, "now and then it was full");
    for (int i = 0; i < GP_BLOCKS; i++) {
        if (t[i].at) {
            give_back(&t[i]);
        }
    }
    taken all;
    CHECK(take(&all, BYTES, 'z'), "in the end all is there");
    give_back(&all);
}

static void *take_turns(void *data) {
    const char mark = *(const char *) data;
    taken t[3] = { 0 };
    for (int i = 0; i < 20000; i++) {
        taken *one = &t[fake_random(3)];
        if (one->at) {
            give_back(one);
        } else {
            (void) take(one, 1 + fake_random(600), mark);
        }
    }
    for (int i = 0; i < 3; i++) {
        if (t[i].at) {
            give_back(&t[i]);
        }
    }
    return NULL;
}

static void several_threads(void) {
    static const char marks[THREADS] = { 'a', 'b', 'c', 'd' };
    pthread_t threads[THREADS];
    begin(BYTES);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, take_turns, (void *) (uintptr_t) &marks[i]) == 0, "the test has threads");
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    taken all;
    CHECK(take(&all, BYTES, 'z'), "in the end all is there");
}

int main(void) {
    check_begin();
    atomic_flag_clear(&scratch.is_busy);
    whole_memory_is_one_block();
    goes_round_the_end();
    so_many_blocks_and_no_more();
    random_orders();
    several_threads();
    return 0;
}
