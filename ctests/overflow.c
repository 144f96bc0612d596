/* Reads behind an allocation. */
#include <stdlib.h>

int main(int argc, char **argv) {
    char *p = malloc((size_t)argc);
    (void)argv;
    return p ? p[argc] : 0;
}
