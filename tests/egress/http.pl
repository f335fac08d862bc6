# Files of a directory by HTTP: GET and PUT, one request per connection.
use strict;
use warnings;
use Socket qw(:DEFAULT :addrinfo IPPROTO_IPV6 IPV6_V6ONLY PF_INET6 IN6ADDR_ANY pack_sockaddr_in6);
my ($port, $directory) = @ARGV;
# Both versions of IP, where the kernel has IPv6.
my $address = pack_sockaddr_in6($port, IN6ADDR_ANY);
my $listener;
if (socket($listener, PF_INET6, SOCK_STREAM, 0)) {
    setsockopt($listener, IPPROTO_IPV6, IPV6_V6ONLY, 0) or die "setsockopt: $!";
} else {
    socket($listener, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
    $address = pack_sockaddr_in($port, INADDR_ANY);
}
setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1) or die "setsockopt: $!";
bind($listener, $address) or die "bind: $!";
listen($listener, 64) or die "listen: $!";
$SIG{CHLD} = "IGNORE";
$| = 1;
print "READY\n";
while (my $from = accept(my $client, $listener)) {
    # Who asks, as it is seen here.
    my (undef, $host) = getnameinfo($from, NI_NUMERICHOST | NI_NUMERICSERV);
    $host =~ s/^::ffff://;
    print "FROM $host\n";
    next if fork;
    binmode $client;
    my ($method, $path) = <$client> =~ m{^(\S+) /([^?\s]*)};
    my $length = 0;
    while (my $line = <$client>) {
        last if $line eq "\r\n";
        $length = $1 if $line =~ /^content-length: (\d+)/i;
        syswrite($client, "HTTP/1.1 100 Continue\r\n\r\n") if $line =~ /^expect: 100/i;
    }
    my ($status, $body) = ("404 Not Found", "");
    if ($method eq "PUT") {
        read($client, my $content, $length) == $length or exit 1;
        open(my $file, ">:raw", "$directory/$path") or exit 1;
        print $file $content;
        close($file) or exit 1;
        $status = "201 Created";
    } elsif (-f "$directory/$path" && open(my $file, "<:raw", "$directory/$path")) {
        local $/;
        ($status, $body) = ("200 OK", <$file>);
    }
    printf $client "HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n", $status, length $body;
    print $client $body;
    close($client);
    exit 0;
}
