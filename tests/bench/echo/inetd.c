/* The echo daemon as (x)inetd starts it: the connection is standard input and output. */
#include <unistd.h>

int main(void)
{
    char buffer[1024];
    ssize_t count;
    while ((count = read(0, buffer, sizeof buffer)) > 0)
        if (write(1, buffer, count) != count)
            return 1;
    return 0;
}
