"""What is known of forms of calls, for the tests of replays."""

import pytest

from moegate.impl import replay


@pytest.fixture
def forgotten():
    """No form is known before a test, and none after it."""
    replay.forget()
    yield
    replay.forget()


def plans():
    return [known for known in replay._forms.values() if isinstance(known, replay.Plan)]


def reasons():
    """Why forms have no plan."""
    return [known for known in replay._forms.values() if isinstance(known, str)]
