// A static binary in another language: one ASSIGN on a bound socket; prints its result.
use std::net::TcpListener;
use std::os::fd::AsRawFd;

extern "C" {
    fn setsockopt(fd: i32, level: i32, option: i32, value: *const u8, length: u32) -> i32;
}

fn main() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("bind");
    let assign = [1, 0, 0, 0, 192, 0, 2, 7, 0, 80, 0, 0];
    let result = unsafe { setsockopt(socket.as_raw_fd(), 0, 11274, assign.as_ptr(), 12) };
    println!("ASSIGN {result}");
}
