/* A check names what must hold; the first that does not ends the program with 1. */
#ifndef GGUF_PAGER_TEST_CHECK_H
#define GGUF_PAGER_TEST_CHECK_H

#include <stdio.h>
#include <unistd.h>

/* A hang is a failure too: SIGALRM ends the program. Sanitizers slow a program down tenfold, and as many run at once as there
 * are processors: a program that takes 27 s of one was ended after 40. */
enum { CHECK_SECONDS = 120 };

static inline void check_begin(void) {
    alarm(CHECK_SECONDS);
}

static inline void check_failed(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
    _exit(1);
}

#define CHECK(holds, what) ((holds) ? (void) 0 : check_failed(__FILE__, __LINE__, what))

#endif
