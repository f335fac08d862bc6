# Gives back what comes, on any number of connections.
use strict;
use warnings;
use Socket;
my ($port) = @ARGV;
socket(my $listener, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1) or die "setsockopt: $!";
bind($listener, pack_sockaddr_in($port, INADDR_ANY)) or die "bind: $!";
listen($listener, 1024) or die "listen: $!";
my %clients;
my $watched = "";
vec($watched, fileno($listener), 1) = 1;
$| = 1;
print "READY\n";
while (1) {
    select(my $ready = $watched, undef, undef, undef) > 0 or next;
    if (vec($ready, fileno($listener), 1) && accept(my $client, $listener)) {
        $clients{fileno($client)} = $client;
        vec($watched, fileno($client), 1) = 1;
    }
    for my $number (grep { vec($ready, $_, 1) } keys %clients) {
        my $client = $clients{$number};
        if (sysread($client, my $bytes, 65536)) {
            syswrite($client, $bytes);
        } else {
            vec($watched, $number, 1) = 0;
            delete $clients{$number};
            close($client);
        }
    }
}
