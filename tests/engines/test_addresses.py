import socket

from fiberpo_megatron.engines.addresses import HIGHEST, LOWEST, free_ports, interface_of, is_free, local_address


def test_free_ports_differ_and_can_be_bound():
    ports = free_ports(20, "127.0.0.1")
    assert len(set(ports)) == 20 and all(LOWEST <= port <= HIGHEST and is_free(port, "127.0.0.1") for port in ports)


def test_a_port_with_a_listener_is_not_free():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not is_free(listener.getsockname()[1], "127.0.0.1")


def test_a_machine_on_its_own_uses_loopback():
    assert local_address([]) == local_address(["127.0.0.1", "localhost", "127.0.1.1"]) == "127.0.0.1"


def test_one_other_machine_needs_the_address_that_faces_it():
    outwards = local_address(["127.0.0.1", "192.0.2.1"])
    assert not outwards.startswith("127.") and interface_of(outwards) is not None
    assert local_address([outwards]) == "127.0.0.1", "its own outer address is this machine too"


def test_interfaces():
    assert interface_of("127.0.0.1") == interface_of("localhost") == "lo"
    assert interface_of("192.0.2.1") is None and interface_of("no.such.host.invalid") is None
