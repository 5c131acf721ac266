"""Who may do what: authentication, and the secrets it rests on."""
