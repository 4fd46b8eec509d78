import socket

from fiberpo_megatron.rollout.ports import HIGHEST, LOWEST, free_ports, is_free


def test_free_ports_differ_and_can_be_bound():
    ports = free_ports(20, "127.0.0.1")
    assert len(set(ports)) == 20 and all(LOWEST <= port <= HIGHEST and is_free(port, "127.0.0.1") for port in ports)


def test_a_port_with_a_listener_is_not_free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not is_free(listener.getsockname()[1], "127.0.0.1")
