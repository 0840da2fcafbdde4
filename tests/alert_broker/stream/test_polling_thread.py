"""Calls that the polling thread carries out for other threads."""

import threading

import pytest

from alert_broker.stream.polling_thread import PollingThread


def test_the_polling_thread_need_not_ask_itself():
    assert PollingThread().ask(threading.get_ident) == threading.get_ident()


@pytest.fixture
def ask():
    """ask(call): ask from another thread, and return what it got or what was raised there."""
    polling = PollingThread()

    def ask(call):
        found = []

        def work():
            try:
                found.append(polling.ask(call))
            except ZeroDivisionError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            polling.serve()
        return found[0]

    return ask


def test_a_call_of_another_thread_is_carried_out_here(ask):
    assert ask(threading.get_ident) == threading.get_ident()


def test_an_error_is_raised_in_the_thread_that_asked(ask):
    assert isinstance(ask(lambda: 1 / 0), ZeroDivisionError)


def test_who_asks_waits_until_the_polling_thread_serves():
    """Without `serve` nothing is carried out."""
    polling, called = PollingThread(), []
    thread = threading.Thread(target=polling.ask, args=(lambda: called.append(1),))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert called == []
    polling.serve()
    thread.join()
    assert called == [1]
