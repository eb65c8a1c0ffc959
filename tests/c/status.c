/* Every status that needs no driver, the one of having none, and that nothing else is said of good arguments. */
#include "fusedkd.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;
static double numbers[64]; /* stands for device memory: nothing here reads it */
static fusedkd_rows_args args;

static void good(fusedkd_divergence divergence) {
    if (fusedkd_rows_defaults(&args, divergence) != FUSEDKD_OK) failures++;
    args.rows = 2;
    args.vocab_size = 16;
    args.dtype = FUSEDKD_BFLOAT16;
    args.student = args.teacher = args.grad = numbers;
    args.labels = (int64_t *)numbers;
    args.weights = args.loss = (float *)numbers;
    args.workspace = numbers;
    args.workspace_bytes = sizeof numbers;
}

static void expect(const char *what, fusedkd_status wanted) {
    fusedkd_status found = fusedkd_rows(&args, NULL);
    if (found != wanted) {
        fprintf(stderr, "%s: status %d (%s), not %d\n", what, (int)found, fusedkd_status_string(found), (int)wanted);
        failures++;
    }
    good(FUSEDKD_DIVERGENCE_RKL);
}

#define WRONG(change, status) \
    do {                      \
        change;               \
        expect(#change, status); \
    } while (0)

int main(void) {
    setenv("FUSEDKD_LIBCUDA", "/nowhere/libcuda.so.1", 1);
    good(FUSEDKD_DIVERGENCE_RKL);
    expect("good arguments", FUSEDKD_NO_DRIVER);
    for (int i = 0; fusedkd_divergence_name((fusedkd_divergence)i); i++) {
        good((fusedkd_divergence)i);
        expect(fusedkd_divergence_name((fusedkd_divergence)i), FUSEDKD_NO_DRIVER);
    }
    WRONG(args.size = 8, FUSEDKD_BAD_ARGS);
    WRONG(args.divergence = (fusedkd_divergence)99, FUSEDKD_BAD_DIVERGENCE);
    WRONG(args.divergence = (fusedkd_divergence)-1, FUSEDKD_BAD_DIVERGENCE);
    WRONG(good(FUSEDKD_DIVERGENCE_DRKL); args.parameters[0] = 0, FUSEDKD_BAD_PARAMETER);
    WRONG(good(FUSEDKD_DIVERGENCE_DRKL); args.parameters[0] = NAN, FUSEDKD_BAD_PARAMETER);
    WRONG(good(FUSEDKD_DIVERGENCE_JSD); args.parameters[0] = 1.001, FUSEDKD_BAD_PARAMETER);
    WRONG(good(FUSEDKD_DIVERGENCE_AB); args.parameters[1] = -16.001, FUSEDKD_BAD_PARAMETER);
    WRONG(good(FUSEDKD_DIVERGENCE_SRKL); args.parameters[1] = 0.5, FUSEDKD_BAD_PARAMETER);
    WRONG(args.target = -1, FUSEDKD_BAD_WEIGHT);
    WRONG(args.nontarget = INFINITY, FUSEDKD_BAD_WEIGHT);
    WRONG(good(FUSEDKD_DIVERGENCE_DRKL); args.target = 2, FUSEDKD_BAD_WEIGHT);
    WRONG(good(FUSEDKD_DIVERGENCE_AKL); args.decoupled = 1, FUSEDKD_BAD_STRUCTURE);
    WRONG(good(FUSEDKD_DIVERGENCE_DKD); args.decoupled = 1, FUSEDKD_BAD_STRUCTURE);
    WRONG(args.rows = -1, FUSEDKD_BAD_SHAPE);
    WRONG(args.rows = (int64_t)1 << 31, FUSEDKD_BAD_SHAPE);
    WRONG(args.vocab_size = 0, FUSEDKD_BAD_SHAPE);
    WRONG(args.width = 15, FUSEDKD_BAD_SHAPE);
    WRONG(args.grad_column_stride = 0, FUSEDKD_BAD_STRIDE);
    WRONG(args.dtype = (fusedkd_dtype)3, FUSEDKD_BAD_DTYPE);
    WRONG(args.student = NULL, FUSEDKD_BAD_POINTER);
    WRONG(args.loss = NULL, FUSEDKD_BAD_POINTER);
    WRONG(args.teacher = (char *)numbers + 1, FUSEDKD_BAD_POINTER);
    WRONG(args.temperature = 0, FUSEDKD_BAD_TEMPERATURE);
    WRONG(args.temperature = NAN, FUSEDKD_BAD_TEMPERATURE);
    WRONG(good(FUSEDKD_DIVERGENCE_DRKL); args.labels = NULL, FUSEDKD_NEEDS_LABELS);
    WRONG(args.labels = NULL; args.nontarget = 2, FUSEDKD_NEEDS_LABELS);
    WRONG(args.decoupled = 1; args.labels = NULL, FUSEDKD_NEEDS_LABELS);
    WRONG(args.weights = NULL; args.workspace = NULL, FUSEDKD_BAD_WORKSPACE);
    WRONG(args.weights = NULL; args.workspace_bytes = 7, FUSEDKD_BAD_WORKSPACE);
    if (fusedkd_rows(NULL, NULL) != FUSEDKD_BAD_ARGS || fusedkd_rows_workspace(&args, NULL) != FUSEDKD_BAD_ARGS) failures++;
    if (fusedkd_rows_defaults(NULL, FUSEDKD_DIVERGENCE_FKL) != FUSEDKD_BAD_ARGS) failures++;
    for (int status = FUSEDKD_OK; status <= FUSEDKD_DRIVER_ERROR; status++)
        if (!strcmp(fusedkd_status_string((fusedkd_status)status), "unknown status")) failures++;
    if (strcmp(fusedkd_status_string((fusedkd_status)99), "unknown status")) failures++;
    if (!failures) printf("%s\n", fusedkd_status_string(FUSEDKD_NO_DRIVER));
    return failures != 0;
}
