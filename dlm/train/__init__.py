"""One resolved config goes in; a trained, validated and recorded run comes out (torch and Lightning)."""
