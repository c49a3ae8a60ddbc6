/* Handles, counts of calls, failures and violations: what tests ask and tell. */
#define _GNU_SOURCE
#include "standin.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t something_ran = PTHREAD_COND_INITIALIZER;
Machine machine;

void *zeroed(size_t size) {
    void *found = calloc(1, size ? size : 1);
    if (!found)
        abort();
    return found;
}

static long from_environment(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

__attribute__((constructor)) static void choose_machine(void) {
    machine.version = (int)from_environment("STANDIN_VERSION", 12090);
    machine.devices = (int)from_environment("STANDIN_DEVICES", 1);
    if (machine.devices > MOST_DEVICES)
        machine.devices = MOST_DEVICES;
    machine.capability = (int)from_environment("STANDIN_CAPABILITY", 90);
    machine.memory = (size_t)from_environment("STANDIN_MEMORY", 1L << 30);
    machine.integrated = from_environment("STANDIN_INTEGRATED", 0) != 0;
    machine.pools = from_environment("STANDIN_POOLS", 1) != 0;
    machine.eager = from_environment("STANDIN_EAGER", 0) != 0;
    machine.abort = from_environment("STANDIN_ABORT", 0) != 0;
}

/* ---- handles ---- */

#define MOST_HANDLES (1 << 20)
static Handle *handles;
static size_t handles_used;
static Handle *free_handles[KINDS];
static size_t live[KINDS];

Handle *new_handle(enum kind kind, void *object) {
    if (!handles) {
        handles = mmap(NULL, MOST_HANDLES * sizeof(Handle), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (handles == MAP_FAILED)
            abort();
    }
    Handle *handle = free_handles[kind];
    if (handle)
        free_handles[kind] = handle->next_free;
    else if (handles_used == MOST_HANDLES)
        abort();
    else
        handle = &handles[handles_used++];
    *handle = (Handle){kind, object, NULL};
    live[kind]++;
    return handle;
}

void free_handle(Handle *handle) {
    enum kind kind = handle->kind;
    *handle = (Handle){NO_KIND, NULL, free_handles[kind]};
    free_handles[kind] = handle;
    live[kind]--;
}

void *object_of(const void *handle, enum kind kind) {
    uintptr_t offset = (uintptr_t)handle - (uintptr_t)handles;
    if (!handles || offset >= handles_used * sizeof(Handle) || offset % sizeof(Handle))
        return NULL;
    const Handle *found = handle;
    return found->kind == kind ? found->object : NULL;
}

size_t live_handles(enum kind kind) { return live[kind]; }

/* ---- counting, failing, violations ---- */

static Counter *counters;
static char fail_name[128];
static long fail_in; /* calls until the one that fails; 0: none */
static CUresult fail_code;
static char failed_name[128];
_Thread_local bool in_host_function;

static const char **call_log; /* names, in order */
static size_t log_count, log_room;

/* Notes a call; answers the error that a test asked for. */
static CUresult note(Counter *counter) {
    if (!counter->listed) {
        counter->listed = true;
        counter->next = counters;
        counters = counter;
    }
    counter->calls++;
    if (!strncmp(counter->name, "standin_", 8))
        return SUCCESS;
    if (log_count == log_room) {
        log_room = log_room ? 2 * log_room : 4096;
        call_log = realloc(call_log, log_room * sizeof *call_log);
        if (!call_log)
            abort();
    }
    call_log[log_count++] = counter->name;
    bool meant = !strcmp(fail_name, "*") || !strcmp(fail_name, counter->name);
    if (fail_in && meant && --fail_in == 0) {
        snprintf(failed_name, sizeof failed_name, "%s", counter->name);
        return fail_code;
    }
    return SUCCESS;
}

CUresult enter(Counter *counter, bool *locked) {
    pthread_mutex_lock(&lock);
    *locked = true;
    CUresult result = note(counter);
    return in_host_function ? NOT_PERMITTED : result;
}

void leave(bool *locked) {
    if (*locked)
        pthread_mutex_unlock(&lock);
}

#define MOST_VIOLATIONS 64
static char violations[MOST_VIOLATIONS][200];
static size_t violation_count;

void violation(const char *format, ...) {
    char text[200];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    fprintf(stderr, "libcuda stand-in: %s\n", text);
    if (machine.abort)
        abort();
    if (violation_count < MOST_VIOLATIONS)
        memcpy(violations[violation_count], text, sizeof text);
    violation_count++;
}

/* How often a function was called since the last reset, by the name in CUDA's documentation; all of them for "*". */
API size_t standin_calls(const char *name) {
    pthread_mutex_lock(&lock);
    size_t calls = strcmp(name, "*") ? 0 : log_count;
    for (Counter *counter = counters; counter; counter = counter->next)
        if (!strcmp(counter->name, name))
            calls += counter->calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

/* The name of call i since the last reset. */
API const char *standin_call(size_t i) { return i < log_count ? call_log[i] : ""; }

/* Counts a call of another library as if it were one of the driver, so that it may fail, too. */
API CUresult standin_note(const char *name) {
    pthread_mutex_lock(&lock);
    Counter *counter = counters;
    while (counter && strcmp(counter->name, name))
        counter = counter->next;
    if (!counter) {
        counter = zeroed(sizeof *counter);
        counter->name = strdup(name);
    }
    CUresult result = note(counter);
    pthread_mutex_unlock(&lock);
    return result;
}

/* Forgets calls, violations, failures and lost contexts. What is allocated stays. */
API void standin_reset(void) {
    pthread_mutex_lock(&lock);
    for (Counter *counter = counters; counter; counter = counter->next)
        counter->calls = 0;
    log_count = violation_count = 0;
    fail_in = 0;
    failed_name[0] = 0;
    forget_losses();
    pthread_mutex_unlock(&lock);
}

/* Lets the nth next call of a function (1 is the next one) fail with a code; "*" for any function, n = 0 for none. */
API void standin_fail_at(const char *name, long n, int code) {
    pthread_mutex_lock(&lock);
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_in = n;
    fail_code = code;
    failed_name[0] = 0;
    pthread_mutex_unlock(&lock);
}

/* The function that failed for the sake of a test; empty for none. */
API const char *standin_failed(void) { return failed_name; }

API size_t standin_violations(void) {
    pthread_mutex_lock(&lock);
    check_guards();
    size_t count = violation_count;
    pthread_mutex_unlock(&lock);
    return count;
}

API const char *standin_violation(size_t i) {
    return i < violation_count && i < MOST_VIOLATIONS ? violations[i] : "";
}

/* How many of what is in the table exist, or blocks of memory: "device", "host". */
API size_t standin_live(const char *what) {
    const struct {
        const char *name;
        enum kind kind;
    } names[] = {{"stream", STREAM}, {"event", EVENT}, {"graph", GRAPH}, {"executable", EXEC}, {"pool", POOL},
                 {"context", CONTEXT}, {"user object", USER_OBJECT}};
    size_t count = 0;
    pthread_mutex_lock(&lock);
    if (!strcmp(what, "device") || !strcmp(what, "host"))
        count = live_blocks(!strcmp(what, "host"));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i].name, what))
            count = live[names[i].kind];
    pthread_mutex_unlock(&lock);
    return count;
}

API void standin_set_memory(size_t bytes) { machine.memory = bytes; }

API void standin_set_eager(int eager) { machine.eager = eager != 0; }
