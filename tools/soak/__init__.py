# SPDX-License-Identifier: Apache-2.0
"""A served process under mixed traffic above its capacity, a third of it aborted.

``make soak`` runs it. :mod:`.traffic` says what is asked, :mod:`.client` asks, aborts and compares,
:mod:`.state` looks at the processes, from outside and through a plugin from inside, and
:mod:`.report` says what was found.
"""
