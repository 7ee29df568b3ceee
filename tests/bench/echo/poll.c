/* The echo daemon as one loop around poll(2). Prints its port. */
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 8192

int main(void)
{
    static struct pollfd fds[MOST];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int open = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    bind(listener, (struct sockaddr *)&address, sizeof address);
    listen(listener, 4096);
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    fds[0] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (;;) {
        poll(fds, open, -1);
        for (int i = open - 1; i > 0; i--) {
            char buffer[1024];
            ssize_t count;
            if (!fds[i].revents)
                continue;
            count = read(fds[i].fd, buffer, sizeof buffer);
            if (count <= 0 || write(fds[i].fd, buffer, count) != count) {
                close(fds[i].fd);
                fds[i] = fds[--open];
            }
        }
        if (fds[0].revents && open < MOST)
            fds[open++] = (struct pollfd){.fd = accept(listener, NULL, NULL), .events = POLLIN};
    }
}
