# Connections at once, which are kept until a line comes, then connections one after the other; on
# each what is sent must come back.
use strict;
use warnings;
use Socket;
my ($address, $port, $at_once, $in_a_row) = @ARGV;
my $to = pack_sockaddr_in($port, inet_aton($address));
sub connection {
    socket(my $socket, PF_INET, SOCK_STREAM, 0) or die "socket: $!";
    connect($socket, $to) or die "connect: $!";
    return $socket;
}
sub exchange {
    my ($socket, $what) = @_;
    my $sent = "$what, and again " x 40;
    syswrite($socket, $sent) == length $sent or die "write: $!";
    my $came = "";
    while (length $came < length $sent) {
        sysread($socket, $came, 65536, length $came) or die "read: $!";
    }
    $came eq $sent or die "another content on $what";
}
$| = 1;
my @sockets = map { connection() } 1 .. $at_once;
exchange($sockets[$_], "flow $_") for 0 .. $#sockets;
print "OPEN\n";
<STDIN>;
exchange($sockets[$_], "flow $_ once more") for reverse 0 .. $#sockets;
close($_) for @sockets;
print "CLOSED\n";
<STDIN>;
for my $number (1 .. $in_a_row) {
    my $socket = connection();
    exchange($socket, "short flow $number");
    close($socket);
}
print "DONE\n";
