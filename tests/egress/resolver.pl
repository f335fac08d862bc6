# A name server for which every name has the address 192.0.2.77. By UDP it says of names that begin
# with "big" that the answer does not fit.
use strict;
use warnings;
use Socket qw(:DEFAULT IPPROTO_IPV6 IPV6_V6ONLY PF_INET6 IN6ADDR_ANY pack_sockaddr_in6);
my ($port) = @ARGV;
sub answer {
    my ($query, $truncated) = @_;
    my ($id) = unpack("n", $query);
    my ($labels) = substr($query, 12) =~ /^((?:[^\0].*?)\0)/s;
    my $question = $labels . substr($query, 12 + length $labels, 4);
    my $header = pack("n6", $id, $truncated ? 0x8780 : 0x8580, 1, $truncated ? 0 : 1, 0, 0);
    my $record = pack("n3Nn", 0xc00c, 1, 1, 60, 4) . inet_aton("192.0.2.77");
    return $header . $question . ($truncated ? "" : $record);
}
# Both versions of IP, where the kernel has IPv6.
sub bound {
    my ($kind) = @_;
    my $address = pack_sockaddr_in6($port, IN6ADDR_ANY);
    my $socket;
    if (socket($socket, PF_INET6, $kind, 0)) {
        setsockopt($socket, IPPROTO_IPV6, IPV6_V6ONLY, 0) or die "setsockopt: $!";
    } else {
        socket($socket, PF_INET, $kind, 0) or die "socket: $!";
        $address = pack_sockaddr_in($port, INADDR_ANY);
    }
    setsockopt($socket, SOL_SOCKET, SO_REUSEADDR, 1) or die "setsockopt: $!";
    bind($socket, $address) or die "bind: $!";
    return $socket;
}
my ($datagrams, $listener) = (bound(SOCK_DGRAM), bound(SOCK_STREAM));
listen($listener, 64) or die "listen: $!";
$| = 1;
print "READY\n";
my %clients;
while (1) {
    my $waiting = "";
    vec($waiting, fileno($_), 1) = 1 for $datagrams, $listener, values %clients;
    select($waiting, undef, undef, undef);
    if (vec($waiting, fileno($datagrams), 1)) {
        my $from = recv($datagrams, my $query, 65535, 0);
        my $reply = answer($query, substr($query, 13, 3) eq "big");
        send($datagrams, $reply, 0, $from);
    }
    for my $client (grep { vec($waiting, fileno($_), 1) } values %clients) {
        if ((read($client, my $length, 2) || 0) == 2) {
            read($client, my $query, unpack("n", $length));
            my $reply = answer($query, 0);
            syswrite($client, pack("n", length $reply) . $reply);
        } else {
            delete $clients{fileno($client)};
        }
    }
    if (vec($waiting, fileno($listener), 1)) {
        accept(my $client, $listener);
        # What is read ahead is not seen by select.
        binmode($client, ":unix");
        $clients{fileno($client)} = $client;
    }
}
