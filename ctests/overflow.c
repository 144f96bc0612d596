/* Reads behind an allocation. */
#include <stdlib.h>

int main(int argc, char **argv) {
    char *p = calloc((size_t)argc, 1);
    (void)argv;
    return p ? p[argc] : 0;
}
